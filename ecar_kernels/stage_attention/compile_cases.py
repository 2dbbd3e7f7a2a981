"""Every stage attention kernel under every launch setting, for the compile gate."""

from collections.abc import Iterator

from ecar_kernels._triton import CompileCase
from ecar_kernels.stage_attention import gradient_kernels, kernels, launch

_KERNELS = {
    "stage_attention": kernels.forward_kernel,
    "stage_attention_keys": gradient_kernels.key_gradients_kernel,
    "stage_attention_queries": gradient_kernels.query_gradients_kernel,
}
_TYPES = {"bfloat16": "bf16", "float16": "fp16", "tf32": "fp32", "exact": "fp32"}
# A setting needs the more registers the wider the head: of each band in one part and in two the
# widest D, and the narrowest of all. Most have no masks; 72, 88, 104 and so on have, one of each
# pair of parts, and need a few more.
HEAD_DIMS = (8, 40, 64, 72, 80, 88, 96, 104, 128, 136, 152, 160, 168, 192, 248, 256)
FEWER_HEAD_DIMS = (64, 72, 96, 104, 128, 136, 168, 192, 248, 256)
_FLOAT32 = ("lse", "delta")


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """bfloat16 at every width; the other types, negative scales and rows at odd addresses where
    registers are fewest."""
    for op in _KERNELS:
        for head_dim in HEAD_DIMS:
            yield from _cases(op, head_dim, "bfloat16", arch)
        for kind in ("tf32", "exact"):
            for head_dim in FEWER_HEAD_DIMS:
                yield from _cases(op, head_dim, kind, arch)
        yield from _cases(op, 72, "float16", arch)
        yield from _cases(op, 96, "bfloat16", arch, negative=True)
        yield from _cases(op, 96, "bfloat16", arch, unit=1)
    for head_dim in HEAD_DIMS:
        yield from _cases("stage_attention", head_dim, "bfloat16", arch, training=True)
    yield from _cases("stage_attention", 96, "bfloat16", arch, training=True, unit=1)
    for kind in launch.KINDS:
        yield _correction(kind)
        yield _correction(kind, negative=True)
        yield _correction(kind, unit=1)
    for dtype, head_dim in (("fp32", 256), ("bf16", 72)):
        its = launch.delta(head_dim)
        constants = {"HEAD_DIM": head_dim, "WIDTH": its.width, "UNIT": 8, "BLOCK_M": its.rows,
                     "ADD_REST": dtype != "fp32"}
        yield _case(f"stage_attention_delta {dtype} D={head_dim}", gradient_kernels.delta_kernel,
                    dtype, constants, its)


def _cases(op: str, head_dim: int, kind: str, arch: int, *, negative: bool = False, unit: int = 8,
           training: bool = False) -> Iterator[CompileCase]:
    """training: of the forward, in a 16-bit type, with what gradients need of it."""
    part1, part2 = launch.parts(head_dim, op, kind)
    if unit == 1:
        found = (launch.unaligned(op, head_dim, kind, arch),)
    else:
        found = launch.settings(op, head_dim, kind, arch)
    for its in found:
        constants = {
            "HEAD_DIM": head_dim, "PART1": part1, "PART2": part2, "UNIT": unit,
            "NEGATIVE": negative, "PRECISION": _precision(kind),
            "RELOAD": launch.reload(op, head_dim, kind),
            "BLOCK_M": its.block_m, "BLOCK_N": its.block_n,
        }
        if op == "stage_attention":
            constants["LEAVE_REST"] = training
        name = f"{op} {kind} D={head_dim} {its.block_m}x{its.block_n}" + " training" * training
        name += " scale<0" * negative + " unaligned" * (unit == 1)
        yield _case(name, _KERNELS[op], _TYPES[kind], constants, its,
                    launch.max_registers(op, head_dim, kind))


def _correction(kind: str, *, negative: bool = False, unit: int = 8) -> CompileCase:
    """Of delta, at any head dimension."""
    its = launch.correction(kind)
    constants = {
        "STRIP": its.strip, "UNIT": unit, "NEGATIVE": negative, "PRECISION": _precision(kind),
        "BLOCK_M": its.block_m, "BLOCK_N": its.block_n,
    }
    name = f"stage_attention_correct_delta {kind} {its.block_m}x{its.block_n}"
    name += " scale<0" * negative + " unaligned" * (unit == 1)
    return _case(name, gradient_kernels.correct_delta_kernel, _TYPES[kind], constants, its,
                 max_registers=255)


def _precision(kind: str) -> str:
    return "tf32" if kind == "tf32" else "ieee"


def _case(name: str, kernel, dtype: str, constants: dict, its,
          max_registers: int | None = None) -> CompileCase:
    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument == "table":
            return "*i32"
        if argument.startswith("scale"):
            return "fp32"
        if argument in kernels.COUNTS or argument.endswith(("_image", "_row", "_head")):
            return "i32"
        return "*fp32" if argument in _FLOAT32 else f"*{dtype}"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    # Strides between heads are 64 / UNIT, say: no multiples of 16.
    aligned = tuple(argument for argument, its_kind in signature.items()
                    if its_kind.startswith("*")
                    or (constants["UNIT"] > 1 and argument.endswith(("_image", "_row"))))
    return CompileCase(name, kernel, signature, constants, its.num_warps,
                       getattr(its, "num_stages", 1), aligned, max_registers)

"""Every stage attention kernel under every launch setting, for the compile gate."""

from collections.abc import Iterator

from ecar_kernels._triton import CompileCase
from ecar_kernels.stage_attention import kernels, launch

_KERNELS = {
    "stage_attention": kernels.forward_kernel,
    "stage_attention_keys": kernels.key_gradients_kernel,
    "stage_attention_queries": kernels.query_gradients_kernel,
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
    for kind in launch.KINDS:
        for head_dim in HEAD_DIMS if kind in ("bfloat16", "exact") else FEWER_HEAD_DIMS:
            yield from _cases("stage_attention_queries", head_dim, kind, arch, few_keys=True)
    yield from _cases("stage_attention_queries", 96, "bfloat16", arch, few_keys=True, negative=True)
    for kind in launch.KINDS:
        yield from _cases("stage_attention_queries", 96, kind, arch, few_keys=True, unit=1)
    for dtype, head_dim in (("fp32", 256), ("bf16", 72)):
        yield _delta(dtype, head_dim)


def _cases(op: str, head_dim: int, kind: str, arch: int, *, negative: bool = False,
           unit: int = 8, few_keys: bool = False) -> Iterator[CompileCase]:
    kernel = _KERNELS[op]
    part1, part2 = launch.parts(head_dim, op, kind)
    if few_keys:
        found = (launch.few_keys(head_dim, kind, arch, aligned=unit > 1),)
    elif unit == 1:
        found = (launch.unaligned(op, head_dim, kind, arch),)
    else:
        found = launch.settings(op, head_dim, kind, arch)
    for its in found:
        constants = {
            "HEAD_DIM": head_dim, "PART1": part1, "PART2": part2, "UNIT": unit,
            "NEGATIVE": negative, "PRECISION": "tf32" if kind == "tf32" else "ieee",
            "RELOAD": launch.reload(op, head_dim, kind, arch),
            "BLOCK_M": its.block_m, "BLOCK_N": its.block_n,
        }
        if op == "stage_attention_queries":
            constants["FEW_KEYS"] = few_keys
        name = f"{op} {kind} D={head_dim} {its.block_m}x{its.block_n}" + " few keys" * few_keys
        name += " scale<0" * negative + " unaligned" * (unit == 1)
        yield _case(name, kernel, _TYPES[kind], constants, its,
                    launch.max_registers(op, head_dim, kind))


def _delta(dtype: str, head_dim: int) -> CompileCase:
    its = launch.delta(head_dim)
    constants = {"HEAD_DIM": head_dim, "WIDTH": its.width, "UNIT": 8, "BLOCK_M": its.rows}
    return _case(f"stage_attention_delta {dtype} D={head_dim}", kernels.delta_kernel, dtype,
                 constants, its)


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

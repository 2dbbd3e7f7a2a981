"""Every stage attention kernel under every launch setting, for the compile gate."""

import itertools
from collections.abc import Iterator

from ecar_kernels import _triton
from ecar_kernels._triton import CompileCase
from ecar_kernels.stage_attention import gradient_kernels, kernels, launch
from ecar_kernels.stage_attention.split_kernels import split_forward_kernel
from ecar_kernels.stage_attention.unaligned_kernels import (
    unaligned_forward_kernel,
    unaligned_key_gradients_kernel,
    unaligned_query_gradients_kernel,
)

_KERNELS = {
    "stage_attention": kernels.forward_kernel,
    "stage_attention_keys": gradient_kernels.key_gradients_kernel,
    "stage_attention_queries": gradient_kernels.query_gradients_kernel,
}
_UNALIGNED = {
    "stage_attention": unaligned_forward_kernel,
    "stage_attention_keys": unaligned_key_gradients_kernel,
    "stage_attention_queries": unaligned_query_gradients_kernel,
}
_TYPES = {"bfloat16": "bf16", "float16": "fp16", "tf32": "fp32", "exact": "fp32"}
# Of each pair of parts from 32 + 16 on, one D whose parts have empty columns, which take masks and
# a few registers more, and the D that fills them; and the narrowest. What makes a setting spill in
# one dtype may fit in another, and the rest of the D are as these are.
HEAD_DIMS = (8, 40, 48, 56, 64, 72, 80, 88, 96, 104, 128, 136, 144, 152, 160, 168, 192, 248, 256)
_FLOAT32 = ("lse", "delta", "sums")
_STRIDED = ("q", "k", "v", "grad")


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """float16 takes the registers of bfloat16: at one width only."""
    for op in _KERNELS:
        for kind in ("bfloat16", "tf32", "exact"):
            for head_dim in HEAD_DIMS:
                yield from _cases(op, head_dim, kind, arch)
        yield from _cases(op, 72, "float16", arch)
    for head_dim in HEAD_DIMS:
        yield from _cases("stage_attention", head_dim, "bfloat16", arch, training=True)
        yield from _cases("stage_attention", head_dim, "bfloat16", arch, negative=True)
        yield from _split(head_dim, "bfloat16", arch)
    yield from _split(72, "bfloat16", arch, negative=True)
    for kind in launch.KINDS:
        yield from _unaligned(kind, arch)
        yield _correction(kind)
        yield _correction(kind, unit=1)
    for dtype, head_dim in (("fp32", 256), ("bf16", 72)):
        its = launch.delta(head_dim)
        for unit in (8, 1):
            constants = {
                "HEAD_DIM": head_dim,
                "WIDTH": its.width,
                "UNIT": unit,
                "BLOCK_M": its.rows,
                "ADD_REST": dtype != "fp32",
            }
            name = f"stage_attention_delta {dtype} D={head_dim}" + " unaligned" * (unit == 1)
            yield _case(
                name, gradient_kernels.delta_kernel, dtype, constants, its, aligned=unit > 1
            )


def _cases(
    op: str, head_dim: int, kind: str, arch: int, *, negative: bool = False, training: bool = False
) -> Iterator[CompileCase]:
    """training: of the forward, in a 16-bit type, with what gradients need of it."""
    part1, part2 = launch.parts(head_dim, op, kind)
    for its in launch.settings(op, head_dim, kind, arch):
        constants = {
            "HEAD_DIM": head_dim,
            "PART1": part1,
            "PART2": part2,
            "PRECISION": _precision(kind),
            "RELOAD": launch.reload(op, head_dim, kind),
            "BLOCK_M": its.block_m,
            "BLOCK_N": its.block_n,
        }
        if op != "stage_attention_keys":
            constants["PIPELINE_TAIL"] = launch.pipeline_tail(kind, arch, its)
        if op == "stage_attention":
            constants |= {"NEGATIVE": negative, "LEAVE_REST": training, **_dependent(arch)}
        name = f"{op} {kind} D={head_dim} {its.block_m}x{its.block_n}" + " training" * training
        name += " scale<0" * negative
        yield _case(
            name,
            _KERNELS[op],
            _TYPES[kind],
            constants,
            its,
            launch.max_registers(op, head_dim, kind),
        )


def _split(head_dim: int, kind: str, arch: int, *, negative: bool = False) -> Iterator[CompileCase]:
    """The forward whose keys are split over programs, where there is one."""
    its = launch.split(head_dim, kind)
    if its is None:
        return
    part1, part2 = launch.parts(head_dim, "stage_attention", kind)
    constants = {
        "HEAD_DIM": head_dim,
        "PART1": part1,
        "PART2": part2,
        "PRECISION": _precision(kind),
        "NEGATIVE": negative,
        "BLOCK_M": its.block_m,
        "BLOCK_N": its.block_n,
    }
    name = f"stage_attention {kind} D={head_dim} {its.block_m}x{its.block_n} split"
    name += " scale<0" * negative
    yield _case(name, split_forward_kernel, _TYPES[kind], constants | _dependent(arch), its)


def _unaligned(kind: str, arch: int) -> Iterator[CompileCase]:
    """At any head dimension; the forward with a negative scale too, and with what gradients need
    of it in 16-bit types."""
    for op, kernel in _UNALIGNED.items():
        its = launch.unaligned(op, kind)
        constants = {
            "COLUMNS": its.columns,
            "STRIP": its.strip,
            "PRECISION": _precision(kind),
            "BLOCK_M": its.block_m,
            "BLOCK_N": its.block_n,
        }
        name = f"{op} {kind} {its.block_m}x{its.block_n} unaligned"
        if op != "stage_attention":
            yield _case(name, kernel, _TYPES[kind], constants, its, 255, aligned=False)
            continue
        for negative, training in itertools.product((False, True), repeat=2):
            if training and _TYPES[kind] == "fp32":
                continue
            yield _case(
                name + " training" * training + " scale<0" * negative,
                kernel,
                _TYPES[kind],
                constants | {"NEGATIVE": negative, "LEAVE_REST": training} | _dependent(arch),
                its,
                255,
                aligned=False,
            )


def _correction(kind: str, *, unit: int = 8) -> CompileCase:
    """Of delta, at any head dimension."""
    its = launch.correction(kind)
    constants = {
        "STRIP": its.strip,
        "UNIT": unit,
        "PRECISION": _precision(kind),
        "BLOCK_M": its.block_m,
        "BLOCK_N": its.block_n,
    }
    name = f"stage_attention_correct_delta {kind} {its.block_m}x{its.block_n}"
    name += " unaligned" * (unit == 1)
    return _case(
        name,
        gradient_kernels.correct_delta_kernel,
        _TYPES[kind],
        constants,
        its,
        max_registers=255,
        aligned=unit > 1,
    )


def _dependent(arch: int) -> dict[str, bool]:
    return {"DEPENDENT": arch >= _triton.DEPENDENT_ARCHITECTURE}


def _precision(kind: str) -> str:
    return "tf32" if kind == "tf32" else "ieee"


def _case(
    name: str,
    kernel,
    dtype: str,
    constants: dict,
    its,
    max_registers: int | None = None,
    *,
    aligned: bool = True,
) -> CompileCase:
    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in ("table", "counters"):
            return "*i32"
        if argument.startswith("scale"):
            return "fp32"
        if argument in kernels.COUNTS or argument.endswith(("_image", "_row", "_head")):
            return "i32"
        return "*fp32" if argument in _FLOAT32 else f"*{dtype}"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    # Strides between heads are 64 / 8, say: no multiples of 16.
    divisible = tuple(
        argument
        for argument, its_kind in signature.items()
        if (its_kind.startswith("*") and (aligned or argument not in _STRIDED))
        or (aligned and argument.endswith(("_image", "_row")))
    )
    return CompileCase(
        name,
        kernel,
        signature,
        constants,
        its.num_warps,
        getattr(its, "num_stages", 1),
        divisible,
        max_registers,
    )

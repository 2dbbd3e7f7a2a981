"""Every kernel of the adaLN family under every launch setting, for the compile gate."""

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from ecar_kernels._triton import CompileCase
from ecar_kernels.adaln import kernels, launch

# The models' widths; else the widest of each setting, and some whose rows are not aligned.
WIDTHS = (13, 256, 512, 768, 1152, 2049, 4095, 4096, 5001, 8191, 8192)
ROWS = (16, 1 << 20)  # one row a program, and as many at once as ever
# Tensors that the op has not, beside the kernels' own.
_ABSENT = {
    "adaln": ("branch", "gate", "step_gate", "new_x"),
    "gated_residual": ("shift", "scale", "step_shift", "step_scale", "y"),
    "gated_residual_adaln": (),
}
_ABSENT_BACKWARD = {
    "adaln": ("grad_new_x", "branch", "gate", "step_gate", "grad_branch", "grad_gate"),
    "gated_residual": ("grad_y", "x", "scale", "step_scale", "grad_x", "grad_scale"),
    "gated_residual_adaln": (),
}
_POINTERS = (
    "x",
    "branch",
    "gate",
    "step_gate",
    "shift",
    "step_shift",
    "scale",
    "step_scale",
    "new_x",
    "y",
    "grad_new_x",
    "grad_y",
    "grad_x",
    "grad_branch",
    "grad_gate",
    "grad_scale",
    "sums",
)


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Each op with every optional part; backward with all that it may write and with no sums.

    float16 takes the registers of bfloat16: at one width only.
    """
    for dtype in ("fp32", "bf16", "fp16"):
        for channels in (1152,) if dtype == "fp16" else WIDTHS:
            for op in _ABSENT:
                yield from _op(op, dtype, channels, arch)
        sizes = {"C": 1152, "BLOCK": launch.SUM_COLUMNS}
        yield _case(f"sum_partial {dtype}", kernels.sum_partial, dtype, sizes, launch.SUM)


def _op(op: str, dtype: str, channels: int, arch: int) -> Iterator[CompileCase]:
    shape = {"C": channels, "BLOCK": launch.padded(channels)}
    settings = (launch.default(op, channels, rows, arch) for rows in ROWS)
    for its in dict.fromkeys(settings):
        constants = shape | dict.fromkeys(_ABSENT[op])
        yield _case(
            f"{op} {dtype} C={channels} rows={its.rows}", kernels.forward, dtype, constants, its
        )
    # How many rows follow one another is no constant, so it makes no other kernel.
    backward = cast(
        "Iterator[launch.BackwardSettings]",
        (launch.default(f"{op}_backward", channels, rows, arch) for rows in ROWS),
    )
    for how in dict.fromkeys(replace(its, program_rows=0) for its in backward):
        absent = _ABSENT_BACKWARD[op]
        if not how.fused and op == "gated_residual_adaln":
            absent = ("branch", "gate", "step_gate", "grad_branch", "grad_gate")
        for sums in (True, False):
            constants = shape | dict.fromkeys(absent)
            flags = ("SUM_GATE", "SUM_SHIFT", "SUM_SCALE")
            for flag, needs in zip(flags, ("branch", "grad_y", "grad_y"), strict=True):
                constants[flag] = sums and needs not in absent
            if not sums:
                constants["partial"] = None
            yield _case(
                f"{op}_backward {dtype} C={channels} rows={how.rows} sums={sums}",
                kernels.backward,
                dtype,
                constants,
                how if sums else how.unsummed(),
            )


def _case(name: str, kernel, dtype: str, constants: dict, settings) -> CompileCase:
    constants = constants | {"ROWS": settings.rows, **settings.loads}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument == "partial":
            return "*fp32"
        if argument in _POINTERS:
            return f"*{dtype}"
        return "fp32" if argument == "eps" else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    # Rows of an odd width start at any address, and so would multiples of 16 be a lie.
    aligned = tuple(
        argument
        for argument, its in signature.items()
        if constants["C"] % 16 == 0
        and argument not in kernels.COUNTS
        and (its.startswith("*") or its == "i32")
    )
    return CompileCase(
        name,
        kernel,
        signature,
        constants,
        settings.num_warps,
        aligned=aligned,
        max_registers=settings.max_registers,
    )

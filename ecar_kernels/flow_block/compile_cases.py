"""Every kernel of the fused GEMMs under every launch setting, for the compile gate."""

import itertools
from collections.abc import Iterator
from typing import Any

from ecar_kernels import _triton
from ecar_kernels._triton import CompileCase
from ecar_kernels.flow_block import kernels, launch, row_kernels

_TYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
_INTEGERS = ("rows", "tokens", "channels", "inputs", "outputs", "width", "part_width")
_FLOATS = ("eps", "scale_offset")
_UNALIGNED = (*kernels.COUNTS, *_FLOATS)
_MODULATION = (
    "shift",
    "shift_image",
    "shift_token",
    "scale",
    "scale_image",
    "scale_token",
    "step_shift",
    "step_shift_image",
    "step_scale",
    "step_scale_image",
)
# Where x comes without its statistics, and with them.
_NO_PARTS: dict[str, Any] = {"parts": None, "part_width": 0}
_PARTS: tuple[dict[str, Any], ...] = (_NO_PARTS, {})


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """What `launch` can choose on `arch`, with every argument that may be None given; what takes
    its rows' statistics, also without."""
    dependent = arch >= _triton.DEPENDENT_ARCHITECTURE
    for dtype, itemsize in _TYPES.items():
        for channels, parts in itertools.product((1024, 2048), _PARTS):
            name = f"C={channels}" + (" parts" if not parts else "")
            yield _case(
                row_kernels.normalise_rows,
                dtype,
                name,
                {"BLOCK": launch.row_block(channels), "DEPENDENT": dependent} | parts,
                num_warps=launch.ROW_WARPS,
            )
        for precision in ("ieee", "tf32") if dtype == "fp32" else ("ieee",):
            for prologue in (False, True):
                for tile in launch.tiles(itemsize, precision, arch, prologue=prologue):
                    yield from _products(dtype, precision, tile, arch)
            if dtype != "fp16":  # as bfloat16
                for tile in launch.odd_tiles():
                    yield from _products(dtype, precision, tile, arch, odd=True)


def _products(
    dtype: str, precision: str, tile: launch.Settings, arch: int, *, odd: bool = False
) -> Iterator[CompileCase]:
    """odd: neither addresses nor sizes are multiples of 16, so that values are read singly."""
    constants = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "PRECISION": precision,
        "DEPENDENT": arch >= _triton.DEPENDENT_ARCHITECTURE,
    }
    how: dict[str, Any] = {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "max_registers": tile.max_registers,
        "odd": odd,
    }
    name = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    for word, said in (("tf32", precision == "tf32"), ("odd", odd), ("prologue", tile.prologue)):
        name += f" {word}" if said else ""
    gelu = constants | {"GELU": True}
    if tile.prologue:
        for parts in _PARTS:
            read = launch.statistics_block(tile.block_m, parts=not parts)
            its = {"STATISTICS": read} | parts
            title = name + (" parts" if not parts else "")
            yield _case(kernels.adaln_linear, dtype, title, gelu | its, **how)
        return
    # float16 takes the registers of bfloat16.
    shares = dtype != "fp16" and launch.shares(tile, odd=odd)
    for parts in _PARTS if shares else ():
        its = (
            gelu
            | parts
            | {
                "ROWS": launch.GROUP,
                "BLOCK": launch.group_block(tile),
                "STATISTICS": launch.statistics_block(launch.GROUP, parts=not parts),
            }
        )
        title = name + (" parts" if not parts else "")
        most = {"max_registers": launch.registers_together(tile, _TYPES[dtype], arch)}
        yield _case(row_kernels.normalise_and_multiply, dtype, title, its, **how | most)
    plain = gelu | {"STATISTICS": 0} | _NO_PARTS | dict.fromkeys(_MODULATION)
    yield _case(kernels.adaln_linear, dtype, name, plain, **how)
    constants |= {"parts": None} if odd else {}
    yield _case(kernels.linear_gated_residual, dtype, name, constants, **how)


def _case(
    kernel,
    dtype: str,
    name: str,
    constants: dict,
    *,
    odd: bool = False,
    num_warps: int,
    num_stages: int = 3,
    max_registers: int | None = None,
) -> CompileCase:
    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in _FLOATS:
            return "fp32"
        if argument in _INTEGERS or argument.endswith(("_image", "_token", "_row")):
            return "i32"
        return {"parts": "*fp32", "counters": "*i32"}.get(argument, f"*{dtype}")

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    aligned = tuple(
        argument
        for argument, its_kind in signature.items()
        if not odd and its_kind != "constexpr" and argument not in _UNALIGNED
    )
    return CompileCase(
        f"{kernel.__name__} {dtype} {name}",
        kernel,
        signature,
        constants,
        num_warps,
        num_stages,
        aligned,
        max_registers,
    )

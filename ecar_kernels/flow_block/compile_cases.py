"""Every kernel of the fused GEMMs under every launch setting, for the compile gate."""

from collections.abc import Iterator
from typing import Any

from ecar_kernels._triton import CompileCase
from ecar_kernels.flow_block import kernels, launch

_TYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
_FLOAT32 = ("statistics", "sums")
_INTEGERS = ("rows", "tokens", "channels", "inputs", "outputs")
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


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """What `launch` can choose on `arch`, with every argument that may be None given."""
    for dtype, itemsize in _TYPES.items():
        for channels in (1024, 2048):
            block = {"BLOCK": launch.row_block(channels)}
            yield _case(
                kernels.normalise_rows,
                dtype,
                f"normalised C={channels}",
                block,
                num_warps=launch.ROW_WARPS,
            )
            yield _case(
                kernels.normalise_rows,
                dtype,
                f"statistics C={channels}",
                block | dict.fromkeys(_MODULATION),
                float32=("out",),
                num_warps=launch.ROW_WARPS,
            )
        for splits in launch.SPLITS[1:]:
            block = {"BLOCK_N": launch.SUM_OUTPUTS, "SPLITS": splits}
            yield _case(
                kernels.reduce_adaln_linear,
                dtype,
                f"splits={splits}",
                block | {"GELU": True},
                num_warps=launch.SUM_WARPS,
            )
            yield _case(
                kernels.reduce_gated_residual,
                dtype,
                f"splits={splits}",
                block,
                num_warps=launch.SUM_WARPS,
            )
        for precision in ("ieee", "tf32") if dtype == "fp32" else ("ieee",):
            for tile in launch.tiles(itemsize, precision, arch):
                yield from _products(dtype, precision, tile)
                if tile.splittable:
                    yield from _products(dtype, precision, tile, split=True)
            if dtype != "fp16":  # as bfloat16
                for tile in launch.odd_tiles():
                    yield from _products(dtype, precision, tile, odd=True)


def _products(
    dtype: str, precision: str, tile: launch.Settings, *, split: bool = False, odd: bool = False
) -> Iterator[CompileCase]:
    """odd: neither addresses nor sizes are multiples of 16, so that values are read singly."""
    constants = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "PRECISION": precision,
        "SPLIT": split,
    }
    how: dict[str, Any] = {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "float32": ("out",) if split else (),
        "odd": odd,
    }
    name = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    for word, said in (("tf32", precision == "tf32"), ("split", split), ("odd", odd)):
        name += f" {word}" if said else ""
    plain = constants | dict.fromkeys(("statistics", *_MODULATION))
    if tile.prologue:
        yield _case(
            kernels.adaln_linear, dtype, f"{name} prologue", constants | {"GELU": True}, **how
        )
    yield _case(kernels.adaln_linear, dtype, name, plain | {"GELU": True}, **how)
    yield _case(kernels.linear_gated_residual, dtype, name, constants, **how)


def _case(
    kernel,
    dtype: str,
    name: str,
    constants: dict,
    *,
    float32: tuple[str, ...] = (),
    odd: bool = False,
    num_warps: int,
    num_stages: int = 3,
) -> CompileCase:
    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in _FLOATS:
            return "fp32"
        if argument in _INTEGERS or argument.endswith(("_image", "_token", "_row")):
            return "i32"
        return "*fp32" if argument in (*_FLOAT32, *float32) else f"*{dtype}"

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
    )

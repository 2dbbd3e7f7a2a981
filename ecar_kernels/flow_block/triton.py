"""The fused GEMMs on GPUs: kernels.py as ops, under the settings of launch.py.

Each is one launch, a product. For many rows the programs of adaln_linear write the normalised x
first, together; only where they have no counters to do so is that a launch of its own.
"""

import torch
from torch import Tensor

from ecar_kernels import _triton, tuning
from ecar_kernels.adaln import triton as unfused
from ecar_kernels.adaln.launch import MAX_WIDTH
from ecar_kernels.flow_block import autograd, kernels, launch, row_kernels

# Of a normalised x: statistics, shift, scale and what a step adds to those.
_NOTHING = None, 0, None, 0, 0, None, 0, 0, None, 0, None, 0


def _run_adaln_linear(x, shift, scale, weight, *others):
    its = _settings("adaln_linear", x, weight)
    return launch_adaln_linear(its, x, shift, scale, weight, *others)


def _run_linear_gated_residual(h, weight, *others):
    its = _settings("linear_gated_residual", h, weight)
    return launch_linear_gated_residual(its, h, weight, *others)


def _settings(op: str, x: Tensor, weight: Tensor) -> launch.Settings:
    rows, (outputs, inputs) = x.shape[0] * x.shape[1], weight.shape
    arch, precision = _triton.architecture(x.device.index), _triton.product_precision(x.dtype)
    usual = launch.default(
        rows,
        outputs,
        inputs,
        x.element_size(),
        precision,
        _triton.multiprocessors(x.device.index),
        arch,
        op == "adaln_linear",
    )
    return tuning.choose(
        op, (outputs, inputs, x.element_size(), precision), rows, usual, x.device.index
    )


def _view(tensor: Tensor) -> tuple[Tensor, int, int]:
    """[B, N, C] or, read for every token, [B, 1, C], with the strides of B and N."""
    return tensor, tensor.stride(0), tensor.stride(1) if tensor.shape[1] > 1 else 0


def room_for_statistics(its: launch.Settings, h: Tensor, weight: Tensor) -> Tensor:
    """[B, N, 3, T] float32: of each of T tiles of a row a number near its mean, the mean less that,
    and the sum of the squared deviations from the mean."""
    parts = launch.programs(its, 1, weight.shape[0])
    return h.new_empty((*h.shape[:2], 3, parts), dtype=torch.float32)


def _step(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """[B, 1, C] or, read for every image, [1, 1, C], with the stride of B."""
    if tensor is None:
        return None, 0
    return tensor, tensor.stride(0) if tensor.shape[0] > 1 else 0


def launch_adaln_linear(
    its: launch.Settings,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step_shift: Tensor | None,
    step_scale: Tensor | None,
    gelu: bool,
    eps: float,
    scale_offset: float,
    statistics: Tensor | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """The op under the settings given.

    statistics: of x, from `launch_linear_gated_residual`; None to make them. keys, values
    [B, N, K / 3]: take the last two thirds of the outputs; the result is the first.
    """
    (batch, tokens, channels), outputs = x.shape, weight.shape[0]
    width = outputs if keys is None else outputs // 3
    out = x.new_empty((batch, tokens, width))
    rows = batch * tokens
    if not out.numel():
        return out
    modulation: tuple[Tensor | int | None, ...] = (
        *_view(shift),
        *_view(scale),
        *_step(step_shift),
        *_step(step_scale),
    )
    parts: tuple[Tensor | None, int] = None, 0
    if statistics is not None:
        parts = statistics.contiguous(), launch.part_width(channels, statistics.shape[-1])
    given = *_view(x), *parts, *modulation
    product: tuple[Tensor | float | None, ...] = (
        weight,
        weight.stride(0),
        bias,
        out,
        width,
        *((None, 0, 0) if keys is None else _view(keys)),
        *((None, 0, 0) if values is None else _view(values)),
        rows,
        tokens,
        outputs,
        channels,
        eps,
        scale_offset,
    )
    grid, tile = _grid(its, rows, outputs), _tile(its, x)
    if its.prologue:
        read = launch.statistics_block(its.block_m, parts=parts[0] is not None)
        kernels.adaln_linear[grid](*given, *product, GELU=gelu, STATISTICS=read, **tile)
        return out
    normalised = x.new_empty((batch, tokens, channels))
    counters, arch = None, _triton.architecture(x.device.index)
    if launch.shares(its, odd=launch.is_odd(outputs, channels)):
        counters = _triton.counters(x.device, launch.counters(its, rows))
    if counters is not None:
        row_kernels.normalise_and_multiply[grid](
            *given,
            *_view(normalised),
            counters,
            *product,
            GELU=gelu,
            ROWS=launch.GROUP,
            BLOCK=launch.group_block(its),
            STATISTICS=launch.statistics_block(launch.GROUP, parts=parts[0] is not None),
            **tile | {"maxnreg": launch.registers_together(its, x.element_size(), arch)},
        )
        return out
    row_kernels.normalise_rows[(rows,)](
        *given,
        normalised,
        rows,
        tokens,
        channels,
        eps,
        scale_offset,
        BLOCK=launch.row_block(channels),
        num_warps=launch.ROW_WARPS,
        **_triton.dependent_launch(x.device.index),
    )
    kernels.adaln_linear[grid](
        *_view(normalised), *_NOTHING, *product, GELU=gelu, STATISTICS=0, **tile
    )
    return out


def launch_linear_gated_residual(
    its: launch.Settings,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    residual: Tensor,
    step_gate: Tensor | None,
    statistics: Tensor | None = None,
) -> Tensor:
    """The op under the settings given; statistics: of `room_for_statistics`, written to."""
    (batch, tokens, inputs), outputs = h.shape, weight.shape[0]
    out = h.new_empty((batch, tokens, outputs))
    rows, parts = batch * tokens, launch.programs(its, 1, outputs)
    if statistics is not None and statistics.shape[-1] != parts:
        raise ValueError(
            f"argument 'statistics': expected [B, N, 3, {parts}], got {list(statistics.shape)}"
        )
    if not out.numel():
        return out
    kernels.linear_gated_residual[_grid(its, rows, outputs)](
        *_view(h),
        weight,
        weight.stride(0),
        bias,
        *_view(gate),
        *_step(step_gate),
        *_view(residual),
        out,
        statistics,
        rows,
        tokens,
        outputs,
        inputs,
        **_tile(its, h),
    )
    return out


def _grid(its: launch.Settings, rows: int, outputs: int) -> tuple[int]:
    return (launch.programs(its, rows, outputs),)


def _tile(its: launch.Settings, x: Tensor) -> dict:
    return {
        "BLOCK_M": its.block_m,
        "BLOCK_N": its.block_n,
        "BLOCK_K": its.block_k,
        "PRECISION": _triton.product_precision(x.dtype),
        "num_warps": its.num_warps,
        "num_stages": its.num_stages,
        "maxnreg": its.max_registers,
        **_triton.dependent_launch(x.device.index),
    }


def _fake_adaln_linear(x, shift, scale, weight, *rest):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_adaln_linear_cached(x, shift, scale, weight, *rest):
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 3))


def _fake_linear_gated_residual(h, weight, *rest):
    return h.new_empty((*h.shape[:-1], weight.shape[0]))


_ADALN_LINEAR = (
    "Tensor x, Tensor shift, Tensor scale, Tensor weight, Tensor? bias, Tensor? step_shift, "
    "Tensor? step_scale, bool gelu, float eps, float scale_offset"
)
_adaln_linear = _triton.register(
    f"adaln_linear({_ADALN_LINEAR}, Tensor? statistics=None) -> Tensor",
    _run_adaln_linear,
    _fake_adaln_linear,
)
_adaln_linear_cached = _triton.register(
    f"adaln_linear_cached({_ADALN_LINEAR}, Tensor? statistics, Tensor(a!) keys, Tensor(b!) values)"
    " -> Tensor",
    _run_adaln_linear,
    _fake_adaln_linear_cached,
)
_LINEAR_GATED_RESIDUAL = (
    "Tensor h, Tensor weight, Tensor? bias, Tensor gate, Tensor residual, Tensor? step_gate"
)
_linear_gated_residual = _triton.register(
    f"linear_gated_residual({_LINEAR_GATED_RESIDUAL}) -> Tensor",
    _run_linear_gated_residual,
    _fake_linear_gated_residual,
)
_linear_gated_residual_chained = _triton.register(
    f"linear_gated_residual_chained({_LINEAR_GATED_RESIDUAL}, Tensor(a!) statistics) -> Tensor",
    _run_linear_gated_residual,
    _fake_linear_gated_residual,
)

adaln_linear = autograd.adaln_linear(
    _adaln_linear, unfused.adaln_forward, unfused.adaln_gradients, by_cpp=False, widest=MAX_WIDTH
)
linear_gated_residual = autograd.linear_gated_residual(
    _linear_gated_residual,
    unfused.gated_residual_forward,
    unfused.gated_residual_gradients,
    by_cpp=False,
    widest=MAX_WIDTH,
)


# The ops without gradients, with what one leaves for the next.


def adaln_linear_chained(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    statistics: Tensor | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    step_shift: Tensor | None = None,
    step_scale: Tensor | None = None,
    activation: str | None = None,
    eps: float = 1e-6,
    scale_offset: float = 1.0,
) -> Tensor:
    """act(adaln(x) weight^T + bias), where x comes with the statistics that were left with it.

    With keys and values [B, N, K / 3], whose last dimension is contiguous, a third of the outputs
    is returned, and the others are written to them.
    """
    given = x, shift, scale, weight, bias, step_shift, step_scale, activation == "gelu_tanh"
    if keys is None:
        return _adaln_linear(*given, eps, scale_offset, statistics)
    return _adaln_linear_cached(*given, eps, scale_offset, statistics, keys, values)


def linear_gated_residual_chained(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    residual: Tensor,
    *,
    step_gate: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The result x, and its statistics for `adaln_linear_chained` of x; None for odd sizes."""
    if launch.is_odd(*weight.shape):
        return _linear_gated_residual(h, weight, bias, gate, residual, step_gate), None
    statistics = room_for_statistics(_settings("linear_gated_residual", h, weight), h, weight)
    given = h, weight, bias, gate, residual, step_gate
    return _linear_gated_residual_chained(*given, statistics), statistics

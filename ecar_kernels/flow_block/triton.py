"""The fused GEMMs on GPUs: kernels.py as ops, under the settings of launch.py.

Each is one launch, a product. Only for many rows has adaln_linear a pass before it, which writes
the normalised x. A product of few rows may be split over its inputs; the last of a tile's programs
adds up what the others left.
"""

import torch
from torch import Tensor

from ecar_kernels import _triton, tuning
from ecar_kernels.adaln import triton as unfused
from ecar_kernels.adaln.launch import MAX_WIDTH
from ecar_kernels.flow_block import autograd, kernels, launch


def _run_adaln_linear(
    x, shift, scale, weight, bias, step_shift, step_scale, gelu, eps, scale_offset, statistics=None
):
    return launch_adaln_linear(
        _settings("adaln_linear", x, weight),
        x,
        shift,
        scale,
        weight,
        bias,
        step_shift,
        step_scale,
        gelu,
        eps,
        scale_offset,
        statistics,
    )


def _run_linear_gated_residual(h, weight, bias, gate, residual, step_gate):
    return _run_linear_gated_residual_statistics(
        h, weight, bias, gate, residual, step_gate, leave=False
    )[0]


def _run_linear_gated_residual_statistics(h, weight, bias, gate, residual, step_gate, leave=True):
    its = _settings("linear_gated_residual", h, weight)
    return launch_linear_gated_residual(
        its, h, weight, bias, gate, residual, step_gate, leave=leave
    )


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
) -> Tensor:
    """The op under the settings given."""
    (batch, tokens, channels), outputs = x.shape, weight.shape[0]
    out = x.new_empty((batch, tokens, outputs))
    rows = batch * tokens
    if not out.numel():
        return out
    modulation: tuple[Tensor | int | None, ...] = (
        *_view(shift),
        *_view(scale),
        *_step(step_shift),
        *_step(step_scale),
    )
    if not its.prologue:
        normalised = x.new_empty((batch, tokens, channels))
        kernels.normalise_rows[(rows,)](
            *_view(x),
            *modulation,
            normalised,
            tokens,
            channels,
            eps,
            scale_offset,
            BLOCK=launch.row_block(channels),
            num_warps=launch.ROW_WARPS,
            **_triton.launch_options(x.device.index),
        )
        x, modulation = normalised, (None, 0, 0, None, 0, 0, None, 0, None, 0)
        statistics = None
    parts, width = 0, 0
    if statistics is not None:
        parts = statistics.shape[-1]
        width = _power_of_2(-(-channels // parts))  # of all parts but the last
    kernels.adaln_linear[_grid(its, rows, outputs)](
        *_view(x),
        statistics,
        parts,
        width,
        *modulation,
        weight,
        weight.stride(0),
        bias,
        out,
        *_splits(its, out),
        rows,
        tokens,
        outputs,
        channels,
        eps,
        scale_offset,
        GELU=gelu,
        STATISTICS=_power_of_2(parts) if parts else launch.statistics_block(its),
        **_tile(its, x),
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
    *,
    leave: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The op under the settings given; leave: with its rows' statistics."""
    (batch, tokens, inputs), outputs = h.shape, weight.shape[0]
    out = h.new_empty((batch, tokens, outputs))
    rows, parts = batch * tokens, -(-outputs // its.block_n)
    statistics = h.new_empty((rows, 3, parts), dtype=torch.float32) if leave else None
    if not out.numel():
        return out, statistics
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
        *_splits(its, out),
        rows,
        tokens,
        outputs,
        inputs,
        **_tile(its, h),
    )
    return out, statistics


def _grid(its: launch.Settings, rows: int, outputs: int) -> tuple[int, int]:
    return -(-rows // its.block_m) * -(-outputs // its.block_n), its.splits


def _splits(its: launch.Settings, out: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Where the programs of a split product leave their sums, and count how many did."""
    if its.splits == 1:
        return None, None
    (batch, tokens, outputs), splits = out.shape, its.splits
    sums = out.new_empty((splits, batch * tokens, outputs), dtype=torch.float32)
    return sums, _triton.counters(out.device, _grid(its, batch * tokens, outputs)[0])


def _power_of_2(size: int) -> int:
    """The least that is not less."""
    return 1 << (size - 1).bit_length()


def _tile(its: launch.Settings, x: Tensor) -> dict:
    return {
        "BLOCK_M": its.block_m,
        "BLOCK_N": its.block_n,
        "BLOCK_K": its.block_k,
        "SPLIT": its.splits > 1,
        "PRECISION": _triton.product_precision(x.dtype),
        "num_warps": its.num_warps,
        "num_stages": its.num_stages,
        **_triton.launch_options(x.device.index),
    }


def _fake_adaln_linear(
    x, shift, scale, weight, bias, step_shift, step_scale, gelu, eps, scale_offset, statistics=None
):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_linear_gated_residual(h, weight, bias, gate, residual, step_gate):
    return h.new_empty((*h.shape[:-1], weight.shape[0]))


def _fake_linear_gated_residual_statistics(h, weight, bias, gate, residual, step_gate):
    out = _fake_linear_gated_residual(h, weight, bias, gate, residual, step_gate)
    # In one part: only a launch knows how many it has.
    return out, h.new_empty((h.shape[0] * h.shape[1], 3, 1), dtype=torch.float32)


_adaln_linear = _triton.register(
    "adaln_linear(Tensor x, Tensor shift, Tensor scale, Tensor weight, Tensor? bias, "
    "Tensor? step_shift, Tensor? step_scale, bool gelu, float eps, float scale_offset, "
    "Tensor? statistics=None) -> Tensor",
    _run_adaln_linear,
    _fake_adaln_linear,
)
_linear_gated_residual = _triton.register(
    "linear_gated_residual(Tensor h, Tensor weight, Tensor? bias, Tensor gate, Tensor residual, "
    "Tensor? step_gate) -> Tensor",
    _run_linear_gated_residual,
    _fake_linear_gated_residual,
)
_linear_gated_residual_statistics = _triton.register(
    "linear_gated_residual_statistics(Tensor h, Tensor weight, Tensor? bias, Tensor gate, "
    "Tensor residual, Tensor? step_gate) -> (Tensor, Tensor)",
    _run_linear_gated_residual_statistics,
    _fake_linear_gated_residual_statistics,
)

_trained_adaln_linear = autograd.adaln_linear(
    lambda *given: _adaln_linear(*given, None),  # no statistics
    unfused.adaln_forward,
    unfused.adaln_gradients,
    ours=False,
    widest=MAX_WIDTH,
)
_trained_linear_gated_residual = autograd.linear_gated_residual(
    _linear_gated_residual,
    unfused.gated_residual_forward,
    unfused.gated_residual_gradients,
    ours=False,
    widest=MAX_WIDTH,
)


def adaln_linear(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    step_shift: Tensor | None = None,
    step_scale: Tensor | None = None,
    activation: str | None = None,
    eps: float = 1e-6,
    scale_offset: float = 1.0,
    statistics: Tensor | None = None,
) -> Tensor:
    """act(adaln(x) weight^T + bias). statistics: what linear_gated_residual returned with x; not
    used where a gradient is asked for."""
    given = x, shift, scale, weight, bias, step_shift, step_scale
    if statistics is None or autograd.needs_gradient(*given):
        return _trained_adaln_linear(
            *given[:5],
            step_shift=step_shift,
            step_scale=step_scale,
            activation=activation,
            eps=eps,
            scale_offset=scale_offset,
        )
    return _adaln_linear(*given, activation == "gelu_tanh", eps, scale_offset, statistics)


def linear_gated_residual(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    residual: Tensor,
    *,
    step_gate: Tensor | None = None,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """residual + (gate + step_gate) (h weight^T + bias). With return_statistics also each row's
    moments in as many parts as the launch has tiles in a row, [B N, 3, parts], float32; None where
    a gradient is asked for."""
    given = h, weight, bias, gate, residual, step_gate
    if return_statistics and not autograd.needs_gradient(*given):
        return _linear_gated_residual_statistics(*given)
    x = _trained_linear_gated_residual(*given[:5], step_gate=step_gate)
    return (x, None) if return_statistics else x

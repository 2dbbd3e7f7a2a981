"""The fused GEMMs on GPUs: kernels.py as ops, under the settings of launch.py.

adaln_linear is two launches, a pass over the rows (statistics, or the normalised x) and the
product; linear_gated_residual is the product alone. A product of few rows is split over its
inputs and has one launch more, the sum of the splits.
"""

import torch
from torch import Tensor

from ecar_kernels import _triton, tuning
from ecar_kernels.adaln import triton as unfused
from ecar_kernels.adaln.launch import MAX_WIDTH
from ecar_kernels.flow_block import autograd, kernels, launch


def _run_adaln_linear(
    x, shift, scale, weight, bias, step_shift, step_scale, gelu, eps, scale_offset
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
    )


def _run_linear_gated_residual(h, weight, bias, gate, residual, step_gate):
    return launch_linear_gated_residual(
        _settings("linear_gated_residual", h, weight), h, weight, bias, gate, residual, step_gate
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
    nothing = (None, 0, 0, None, 0, 0, None, 0, None, 0)
    if its.prologue:
        statistics = first = x.new_empty((rows, 3), dtype=torch.float32)
    else:
        statistics, first = None, x.new_empty((batch, tokens, channels))
    kernels.normalise_rows[(rows,)](
        *_view(x),
        *(nothing if its.prologue else modulation),
        first,
        tokens,
        channels,
        eps,
        scale_offset,
        BLOCK=launch.row_block(channels),
        num_warps=launch.ROW_WARPS,
    )
    if not its.prologue:
        x, modulation = first, nothing
    split = its.splits > 1
    sums = x.new_empty((its.splits, rows, outputs), dtype=torch.float32) if split else out
    kernels.adaln_linear[_grid(its, rows, outputs)](
        *_view(x),
        statistics,
        *modulation,
        weight,
        weight.stride(0),
        bias,
        sums,
        rows,
        tokens,
        outputs,
        channels,
        scale_offset,
        GELU=gelu,
        SPLIT=split,
        **_tile(its, x),
    )
    if split:
        kernels.reduce_adaln_linear[_sum_grid(rows, outputs)](
            sums,
            bias,
            out,
            rows,
            outputs,
            GELU=gelu,
            SPLITS=its.splits,
            BLOCK_N=launch.SUM_OUTPUTS,
            num_warps=launch.SUM_WARPS,
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
) -> Tensor:
    """The op under the settings given."""
    (batch, tokens, inputs), outputs = h.shape, weight.shape[0]
    out = h.new_empty((batch, tokens, outputs))
    rows = batch * tokens
    if not out.numel():
        return out
    epilogue = (bias, *_view(gate), *_step(step_gate), *_view(residual))
    split = its.splits > 1
    sums = h.new_empty((its.splits, rows, outputs), dtype=torch.float32) if split else out
    kernels.linear_gated_residual[_grid(its, rows, outputs)](
        *_view(h),
        weight,
        weight.stride(0),
        *epilogue,
        sums,
        rows,
        tokens,
        outputs,
        inputs,
        SPLIT=split,
        **_tile(its, h),
    )
    if split:
        kernels.reduce_gated_residual[_sum_grid(rows, outputs)](
            sums,
            *epilogue,
            out,
            rows,
            tokens,
            outputs,
            SPLITS=its.splits,
            BLOCK_N=launch.SUM_OUTPUTS,
            num_warps=launch.SUM_WARPS,
        )
    return out


def _grid(its: launch.Settings, rows: int, outputs: int) -> tuple[int, int]:
    return -(-rows // its.block_m) * -(-outputs // its.block_n), its.splits


def _sum_grid(rows: int, outputs: int) -> tuple[int]:
    return (rows * -(-outputs // launch.SUM_OUTPUTS),)


def _tile(its: launch.Settings, x: Tensor) -> dict:
    return {
        "BLOCK_M": its.block_m,
        "BLOCK_N": its.block_n,
        "BLOCK_K": its.block_k,
        "PRECISION": _triton.product_precision(x.dtype),
        "num_warps": its.num_warps,
        "num_stages": its.num_stages,
    }


def _fake_adaln_linear(
    x, shift, scale, weight, bias, step_shift, step_scale, gelu, eps, scale_offset
):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_linear_gated_residual(h, weight, bias, gate, residual, step_gate):
    return h.new_empty((*h.shape[:-1], weight.shape[0]))


_adaln_linear = _triton.register(
    "adaln_linear(Tensor x, Tensor shift, Tensor scale, Tensor weight, Tensor? bias, "
    "Tensor? step_shift, Tensor? step_scale, bool gelu, float eps, float scale_offset) -> Tensor",
    _run_adaln_linear,
    _fake_adaln_linear,
)
_linear_gated_residual = _triton.register(
    "linear_gated_residual(Tensor h, Tensor weight, Tensor? bias, Tensor gate, Tensor residual, "
    "Tensor? step_gate) -> Tensor",
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

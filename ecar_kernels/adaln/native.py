"""The adaLN family in C++, for CPU tensors: csrc/cpu/adaln_isa.cpp.

The ops have no autograd of their own: where a gradient is asked for, the Functions below call
them, and else the ops are called directly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ecar_kernels import _native
from ecar_kernels._transforms import differentiable_again
from ecar_kernels.adaln._autograd import (
    adaln_gradients,
    any_requires_grad,
    both_gradients,
    gated_residual_gradients,
    rows_of,
    shape_of,
)

_native.require()

_adaln = _native.op("adaln")
_adaln_backward = _native.op("adaln_backward")
_gated_residual = _native.op("gated_residual")
_gated_residual_backward = _native.op("gated_residual_backward")
_both = _native.op("gated_residual_adaln")
_both_backward = _native.op("gated_residual_adaln_backward")


def adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    step_shift: Tensor | None = None,
    step_scale: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """y = LN(x) (1 + scale + step_scale) + shift + step_shift."""
    if torch.is_grad_enabled() and any_requires_grad(x, shift, scale, step_shift, step_scale):
        return _AdaLN.apply(x, shift, scale, step_shift, step_scale, eps)
    return _adaln(x, shift, scale, step_shift, step_scale, eps)


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, *, step_gate: Tensor | None = None
) -> Tensor:
    """x + (gate + step_gate) branch."""
    if torch.is_grad_enabled() and any_requires_grad(x, branch, gate, step_gate):
        return _GatedResidual.apply(x, branch, gate, step_gate)
    return _gated_residual(x, branch, gate, step_gate)


def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    step_gate: Tensor | None = None,
    step_shift: Tensor | None = None,
    step_scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The new residual stream, and its adaLN, in one pass."""
    tensors = (x, branch, gate, shift, scale, step_gate, step_shift, step_scale)
    if torch.is_grad_enabled() and any_requires_grad(*tensors):
        return _GatedResidualAdaLN.apply(*tensors, eps)
    return _both(*tensors, eps)


# The three backwards are calls of some 100 us, half of it autograd's: what they ask of shapes is
# asked in the forward, and loops are written out.


def _spatial(wanted: bool, whole: Tensor | None, sums: Tensor, slot: int) -> Tensor | None:
    """The gradient of [B, N, C], `whole`, or of [B, 1, C], out of sums [slots, B + 1, C]."""
    if not wanted:
        return None
    return sums[slot, :-1, None] if whole is None else whole


def _steps(wanted: Sequence[bool], shared: Sequence[bool], sums: Tensor) -> list[Tensor | None]:
    """The gradients of [1, 1, C], shared by all images, or of [B, 1, C]: sums over its images."""
    if not any(wanted):
        return [None] * len(wanted)
    of_all = sums[:, -1:, None].unbind(0)
    return [
        None if not wanted[i] else of_all[i] if shared[i] else sums[i, :-1, None]
        for i in range(len(wanted))
    ]


def _is_shared(step: Tensor | None) -> bool:
    return step is not None and step.shape[0] == 1


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, step_shift, step_scale, eps):
        ctx.save_for_backward(x, scale, step_scale)
        ctx.whole = shift.shape == x.shape, scale.shape == x.shape
        ctx.shared = _is_shared(step_shift), _is_shared(step_scale)
        ctx.shapes = shift.shape, shape_of(step_shift)
        ctx.eps = eps
        return _adaln(x, shift, scale, step_shift, step_scale, eps)

    @staticmethod
    @differentiable_again(adaln_gradients)
    def backward(ctx, grad_y):
        x, scale, step_scale = ctx.saved_tensors
        _, shift_, scale_, *steps_, _ = ctx.needs_input_grad
        whole_shift, whole_scale = ctx.whole
        grad_y = rows_of(grad_y)
        grad_x, grad_scale, sums = _adaln_backward(
            grad_y,
            x,
            scale,
            step_scale,
            ctx.eps,
            scale_ and whole_scale,
            any(steps_) or (shift_ and not whole_shift) or (scale_ and not whole_scale),
        )
        return (
            grad_x,
            _spatial(shift_, grad_y if whole_shift else None, sums, 0),
            _spatial(scale_, grad_scale if whole_scale else None, sums, 1),
            *_steps(steps_, ctx.shared, sums),
            None,
        )


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, step_gate):
        ctx.save_for_backward(branch, gate, step_gate)
        return _gated_residual(x, branch, gate, step_gate)

    @staticmethod
    @differentiable_again(gated_residual_gradients)
    def backward(ctx, grad):
        branch, gate, step_gate = ctx.saved_tensors
        x_, branch_, gate_, step_ = ctx.needs_input_grad
        if not (branch_ or gate_ or step_):
            return grad, None, None, None
        whole = gate.shape == branch.shape
        grad_branch, grad_gate, sums = _gated_residual_backward(
            rows_of(grad), branch, gate, step_gate, gate_ and whole, step_ or (gate_ and not whole)
        )
        return (
            grad if x_ else None,
            grad_branch,
            _spatial(gate_, grad_gate if whole else None, sums, 0),
            *_steps((step_,), (_is_shared(step_gate),), sums),
        )


class _GatedResidualAdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, shift, scale, step_gate, step_shift, step_scale, eps):
        new_x, y = _both(x, branch, gate, shift, scale, step_gate, step_shift, step_scale, eps)
        ctx.save_for_backward(new_x, branch, gate, scale, step_gate, step_scale)
        ctx.whole = gate.shape == x.shape, shift.shape == x.shape, scale.shape == x.shape
        ctx.shared = _is_shared(step_gate), _is_shared(step_shift), _is_shared(step_scale)
        ctx.shapes = shift.shape, shape_of(step_shift)
        ctx.eps = eps
        return new_x, y

    @staticmethod
    @differentiable_again(both_gradients)
    def backward(ctx, grad_new_x, grad_y):
        new_x, branch, gate, scale, step_gate, step_scale = ctx.saved_tensors
        _, _, gate_, shift_, scale_, *steps_, _ = ctx.needs_input_grad
        whole_gate, whole_shift, whole_scale = ctx.whole
        grad_y = rows_of(grad_y)
        grad_x, grad_branch, grad_gate, grad_scale, sums = _both_backward(
            rows_of(grad_new_x),
            grad_y,
            new_x,
            branch,
            gate,
            scale,
            step_gate,
            step_scale,
            ctx.eps,
            gate_ and whole_gate,
            scale_ and whole_scale,
            any(steps_)
            or (gate_ and not whole_gate)
            or (shift_ and not whole_shift)
            or (scale_ and not whole_scale),
        )
        return (
            grad_x,
            grad_branch,
            _spatial(gate_, grad_gate if whole_gate else None, sums, 0),
            _spatial(shift_, grad_y if whole_shift else None, sums, 1),
            _spatial(scale_, grad_scale if whole_scale else None, sums, 2),
            *_steps(steps_, ctx.shared, sums),
            None,
        )


def _gradient(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(x.shape if wanted else 0)


def _sums(x: Tensor, slots: int, wanted: bool) -> Tensor:
    return x.new_empty((slots, x.shape[0] + 1, x.shape[2]) if wanted else 0)


@torch.library.register_fake("ecar::adaln")
def _(x, shift, scale, step_shift, step_scale, eps):
    return x.new_empty(x.shape)


@torch.library.register_fake("ecar::gated_residual")
def _(x, branch, gate, step_gate):
    return x.new_empty(x.shape)


@torch.library.register_fake("ecar::gated_residual_adaln")
def _(x, branch, gate, shift, scale, step_gate, step_shift, step_scale, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("ecar::adaln_backward")
def _(grad_y, x, scale, step_scale, eps, scale_wanted, sums_wanted):
    return x.new_empty(x.shape), _gradient(x, scale_wanted), _sums(x, 2, sums_wanted)


@torch.library.register_fake("ecar::gated_residual_backward")
def _(grad_new_x, branch, gate, step_gate, gate_wanted, sums_wanted):
    return (
        branch.new_empty(branch.shape),
        _gradient(branch, gate_wanted),
        _sums(branch, 1, sums_wanted),
    )


@torch.library.register_fake("ecar::gated_residual_adaln_backward")
def _(
    grad_new_x,
    grad_y,
    new_x,
    branch,
    gate,
    scale,
    step_gate,
    step_scale,
    eps,
    gate_wanted,
    scale_wanted,
    sums_wanted,
):
    return (
        new_x.new_empty(new_x.shape),
        new_x.new_empty(new_x.shape),
        _gradient(new_x, gate_wanted),
        _gradient(new_x, scale_wanted),
        _sums(new_x, 3, sums_wanted),
    )

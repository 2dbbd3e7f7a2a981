"""The adaLN family in C++, for CPU tensors: csrc/cpu/adaln_isa.cpp.

The ops have no autograd of their own: where a gradient is asked for, the Functions below call
them, and else the ops are called directly.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecar_kernels import _native
from ecar_kernels.adaln._autograd import any_requires_grad, rows_of, shape_of

_native.require()

_adaln = torch.ops.ecar.adaln.default
_adaln_backward = torch.ops.ecar.adaln_backward.default
_gated_residual = torch.ops.ecar.gated_residual.default
_gated_residual_backward = torch.ops.ecar.gated_residual_backward.default
_both = torch.ops.ecar.gated_residual_adaln.default
_both_backward = torch.ops.ecar.gated_residual_adaln_backward.default


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


def _spatial(wanted: bool, whole: Tensor | None, sums: Tensor, slot: int) -> Tensor | None:
    """The gradient of [B, N, C], `whole`, or of [B, 1, C], out of sums [slots, B + 1, C]."""
    if not wanted:
        return None
    return sums[slot, :-1, None] if whole is None else whole


def _step(wanted: bool, shape: torch.Size | None, sums: Tensor, slot: int) -> Tensor | None:
    """The gradient of [1, 1, C] or [B, 1, C]: the sum over all images, or each one's."""
    if not wanted:
        return None
    return sums[slot, -1:, None] if shape[0] == 1 else sums[slot, :-1, None]


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, step_shift, step_scale, eps):
        ctx.save_for_backward(x, scale, step_scale)
        ctx.shapes = shift.shape, shape_of(step_shift), shape_of(step_scale)
        ctx.eps = eps
        return _adaln(x, shift, scale, step_shift, step_scale, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, scale, step_scale = ctx.saved_tensors
        shift_shape, step_shift_shape, step_scale_shape = ctx.shapes
        _, shift, scale_, step_shift, step_scale_, _ = ctx.needs_input_grad
        whole_shift, whole_scale = shift_shape == x.shape, scale.shape == x.shape
        grad_y = rows_of(grad_y)
        grad_x, grad_scale, sums = _adaln_backward(
            grad_y,
            x,
            scale,
            step_scale,
            ctx.eps,
            scale_ and whole_scale,
            step_shift
            or step_scale_
            or (shift and not whole_shift)
            or (scale_ and not whole_scale),
        )
        return (
            grad_x,
            _spatial(shift, grad_y if whole_shift else None, sums, 0),
            _spatial(scale_, grad_scale if whole_scale else None, sums, 1),
            _step(step_shift, step_shift_shape, sums, 0),
            _step(step_scale_, step_scale_shape, sums, 1),
            None,
        )


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, step_gate):
        ctx.save_for_backward(branch, gate, step_gate)
        return _gated_residual(x, branch, gate, step_gate)

    @staticmethod
    @once_differentiable
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
            _step(step_, shape_of(step_gate), sums, 0),
        )


class _GatedResidualAdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, shift, scale, step_gate, step_shift, step_scale, eps):
        new_x, y = _both(x, branch, gate, shift, scale, step_gate, step_shift, step_scale, eps)
        ctx.save_for_backward(new_x, branch, gate, scale, step_gate, step_scale)
        ctx.shapes = shift.shape, shape_of(step_shift)
        ctx.eps = eps
        return new_x, y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_new_x, grad_y):
        new_x, branch, gate, scale, step_gate, step_scale = ctx.saved_tensors
        shift_shape, step_shift_shape = ctx.shapes
        _, _, gate_, shift_, scale_, *steps, _ = ctx.needs_input_grad
        grad_y = rows_of(grad_y)
        whole = [shape == new_x.shape for shape in (gate.shape, shift_shape, scale.shape)]
        wanted = (gate_, shift_, scale_)
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
            gate_ and whole[0],
            scale_ and whole[2],
            any(steps)
            or any(want and not all_of_it for want, all_of_it in zip(wanted, whole, strict=True)),
        )
        wholes = (grad_gate, grad_y, grad_scale)
        shapes = (shape_of(step_gate), step_shift_shape, shape_of(step_scale))
        return (
            grad_x,
            grad_branch,
            *(_spatial(wanted[i], wholes[i] if whole[i] else None, sums, i) for i in range(3)),
            *(_step(steps[i], shapes[i], sums, i) for i in range(3)),
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

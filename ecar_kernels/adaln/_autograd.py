"""What the autograd of the family's backends shares."""

import torch
from torch import Tensor

from ecar_kernels import _transforms
from ecar_kernels._precision import widen
from ecar_kernels.adaln import reference


def any_requires_grad(*tensors: Tensor | None) -> bool:
    for tensor in tensors:  # noqa: SIM110 (half the time of any() over a generator)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def rows_of(gradient: Tensor) -> Tensor:
    """A gradient as the kernels take it: that of a sum, say, is expanded from one number."""
    if gradient.stride(-1) == 1:
        return gradient
    # Not contiguous(): without elements a tensor counts as that whatever its strides.
    return gradient.clone(memory_format=torch.contiguous_format)


def shape_of(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


# The three backwards in PyTorch's ops, for `_transforms.differentiable_again`: of what the
# Functions save, and of `ctx.shapes`, those of shift and step_shift.


def adaln_gradients(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, shift, scale, step_shift, step_scale, eps."""
    return (*_of_adaln(ctx, grad_y, *ctx.saved_tensors), None)


def gated_residual_gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, branch, gate, step_gate."""
    return grad, *_of_gated(grad, *ctx.saved_tensors)


def both_gradients(ctx, grad_new_x: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, branch, gate, shift, scale, step_gate, step_shift, step_scale, eps."""
    new_x, branch, gate, scale, step_gate, step_scale = ctx.saved_tensors
    of_x, shift, scale, step_shift, step_scale = _of_adaln(ctx, grad_y, new_x, scale, step_scale)
    grad = grad_new_x + of_x
    branch, gate, step_gate = _of_gated(grad, branch, gate, step_gate)
    return grad, branch, gate, shift, scale, step_gate, step_shift, step_scale, None


def _of_adaln(ctx, grad_y, x, scale, step_scale):
    def function(x, scale, step_scale):
        shift = x.new_zeros(())  # no gradient depends on its value
        return reference.adaln(x, shift, scale, step_scale=step_scale, eps=ctx.eps)

    shift, step_shift = (
        None if shape is None else widen(grad_y).sum_to_size(shape).to(grad_y.dtype)
        for shape in ctx.shapes
    )
    x, scale, step_scale = _transforms.gradients_of(function, (x, scale, step_scale), grad_y)
    return x, shift, scale, step_shift, step_scale


def _of_gated(grad, branch, gate, step_gate):
    def function(branch, gate, step_gate):
        return reference.gated_residual(grad.new_zeros(()), branch, gate, step_gate=step_gate)

    return _transforms.gradients_of(function, (branch, gate, step_gate), grad)

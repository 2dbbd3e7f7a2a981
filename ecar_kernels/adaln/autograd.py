"""The autograd of the family's ops, over any backend.

A backend gives the op's forward, which has no autograd of its own, and its `gradients`. Where no
gradient is asked for, the forward is called directly.
"""

from collections.abc import Callable

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


def is_shared(step: Tensor | None) -> bool:
    """Is a step's part one for all images?"""
    return step is not None and step.shape[0] == 1


# The three backwards in PyTorch's ops, for `_transforms.differentiable_again`: of what the
# Functions save, and of `ctx.shapes`, those of shift and step_shift.


def _adaln_again(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, shift, scale, step_shift, step_scale, eps."""
    return (*_of_adaln(ctx, grad_y, *ctx.saved_tensors), None)


def _gated_residual_again(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, branch, gate, step_gate."""
    return grad, *_of_gated(grad, *ctx.saved_tensors)


def _both_again(ctx, grad_new_x: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
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


# A backward is a call of some 100 us, half of it autograd's: what it asks of shapes is asked in the
# forward. `whole`: which of the modulations' parts are for each token, [B, N, C], so that their
# gradients are; else they are sums over tokens. `shared`: which of the steps' parts are for all
# images.


def adaln(forward: Callable, gradients: Callable) -> Callable:
    """The op, from a backend's.

    forward: (x, shift, scale, step_shift, step_scale, eps) -> y. gradients: ((grad_y, x, scale,
    step_scale, eps), wanted, whole, shared) -> those of x, shift, scale, step_shift, step_scale,
    each None where it is not wanted, or may be.
    """

    class AdaLN(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shift, scale, step_shift, step_scale, eps):
            ctx.save_for_backward(x, scale, step_scale)
            ctx.whole = shift.shape == x.shape, scale.shape == x.shape
            ctx.shared = is_shared(step_shift), is_shared(step_scale)
            ctx.shapes = shift.shape, shape_of(step_shift)
            ctx.eps = eps
            return forward(x, shift, scale, step_shift, step_scale, eps)

        @staticmethod
        @_transforms.differentiable_again(_adaln_again)
        def backward(ctx, grad_y):
            wanted = ctx.needs_input_grad[:5]
            saved = rows_of(grad_y), *ctx.saved_tensors, ctx.eps
            return *gradients(saved, wanted, ctx.whole, ctx.shared), None

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
            return AdaLN.apply(x, shift, scale, step_shift, step_scale, eps)
        return forward(x, shift, scale, step_shift, step_scale, eps)

    return adaln


def gated_residual(forward: Callable, gradients: Callable) -> Callable:
    """The op, from a backend's.

    forward: (x, branch, gate, step_gate) -> x. gradients: ((grad, branch, gate, step_gate),
    wanted, whole, shared) -> those of branch, gate, step_gate.
    """

    class GatedResidual(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, branch, gate, step_gate):
            ctx.save_for_backward(branch, gate, step_gate)
            return forward(x, branch, gate, step_gate)

        @staticmethod
        @_transforms.differentiable_again(_gated_residual_again)
        def backward(ctx, grad):
            branch, gate, step_gate = ctx.saved_tensors
            x_wanted, *wanted = ctx.needs_input_grad
            grad_x = grad if x_wanted else None
            if not any(wanted):
                return grad_x, None, None, None
            whole, shared = (gate.shape == branch.shape,), (is_shared(step_gate),)
            saved = rows_of(grad), branch, gate, step_gate
            return grad_x, *gradients(saved, wanted, whole, shared)

    def gated_residual(
        x: Tensor, branch: Tensor, gate: Tensor, *, step_gate: Tensor | None = None
    ) -> Tensor:
        """x + (gate + step_gate) branch."""
        if torch.is_grad_enabled() and any_requires_grad(x, branch, gate, step_gate):
            return GatedResidual.apply(x, branch, gate, step_gate)
        return forward(x, branch, gate, step_gate)

    return gated_residual


def gated_residual_adaln(forward: Callable, gradients: Callable) -> Callable:
    """The op, from a backend's.

    forward: (x, branch, gate, shift, scale, step_gate, step_shift, step_scale, eps) -> new_x, y.
    gradients: ((grad_new_x, grad_y, new_x, branch, gate, scale, step_gate, step_scale, eps),
    wanted, whole, shared) -> those of all tensors, in the forward's order.
    """

    class GatedResidualAdaLN(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, branch, gate, shift, scale, step_gate, step_shift, step_scale, eps):
            new_x, y = forward(
                x, branch, gate, shift, scale, step_gate, step_shift, step_scale, eps
            )
            ctx.save_for_backward(new_x, branch, gate, scale, step_gate, step_scale)
            shape = x.shape
            ctx.whole = gate.shape == shape, shift.shape == shape, scale.shape == shape
            ctx.shared = is_shared(step_gate), is_shared(step_shift), is_shared(step_scale)
            ctx.shapes = shift.shape, shape_of(step_shift)
            ctx.eps = eps
            return new_x, y

        @staticmethod
        @_transforms.differentiable_again(_both_again)
        def backward(ctx, grad_new_x, grad_y):
            wanted = ctx.needs_input_grad[:8]
            saved = rows_of(grad_new_x), rows_of(grad_y), *ctx.saved_tensors, ctx.eps
            return *gradients(saved, wanted, ctx.whole, ctx.shared), None

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
            return GatedResidualAdaLN.apply(*tensors, eps)
        return forward(*tensors, eps)

    return gated_residual_adaln

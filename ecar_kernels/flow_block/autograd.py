"""The autograd of the fused GEMMs, over any backend.

A backend gives the op's forward, which has no autograd of its own, and the forward and `gradients`
of an op of the adaLN family (`ecar_kernels.adaln.autograd`); other products are PyTorch's. Kept for
the backward are the arguments and what it could not make again in one pass: the tokens before a
GELU, and a branch whose gate has a gradient.

The forward has PyTorch's product where it leaves a branch, and, in the C++ library, which packs
weights, where the weight has a gradient: one that is trained is another at each step, and to pack
it takes longer than the fusion saves. Where no gradient is asked for, the backend's forward is
called directly. What the adaLN family does not serve, another scale_offset than 1 and wider tokens
than `widest`, is PyTorch's ops from end to end.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ecar_kernels import _transforms, recompute
from ecar_kernels.adaln.autograd import any_requires_grad, is_shared, rows_of
from ecar_kernels.flow_block import reference

_ANY = 2**63


def _adaln_linear_again(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The backward in PyTorch's ops, as those of the adaLN family."""

    def function(x, shift, scale, weight, bias, step_shift, step_scale):
        return reference.adaln_linear(
            x,
            shift,
            scale,
            weight,
            bias,
            step_shift=step_shift,
            step_scale=step_scale,
            activation="gelu_tanh" if ctx.gelu else None,
            eps=ctx.eps,
        )

    return *_transforms.gradients_of(function, ctx.saved_tensors[:7], grad), None, None, None


def _linear_gated_residual_again(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    def function(h, weight, bias, gate, step_gate):
        residual = grad.new_zeros(())  # no gradient depends on its value
        return reference.linear_gated_residual(h, weight, bias, gate, residual, step_gate=step_gate)

    found = _transforms.gradients_of(function, ctx.saved_tensors[:5], grad)
    return *found[:4], grad, found[4]


def _in_its_type(x: Tensor) -> torch.autocast:
    """For products: an op computes in its arguments' type, whatever autocast is in force."""
    return torch.autocast(x.device.type, enabled=False)


def adaln_linear(
    forward: Callable, adaln: Callable, gradients: Callable, *, by_cpp: bool, widest: int = _ANY
) -> Callable:
    """The op, from a backend's.

    forward: (x, shift, scale, weight, bias, step_shift, step_scale, gelu, eps, scale_offset) -> y.
    adaln, gradients: as `ecar_kernels.adaln.autograd.adaln` takes them. by_cpp: is it the C++
    library's, which packs weights and has a GELU?
    """

    class AdaLNLinear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shift, scale, weight, bias, step_shift, step_scale, gelu, eps, offset):
            given = x, shift, scale, weight, bias, step_shift, step_scale
            ctx.gelu, ctx.eps = gelu, eps
            if by_cpp and ctx.needs_input_grad[3]:
                with _in_its_type(x):
                    z = adaln(x, shift, scale, step_shift, step_scale, eps)
                    y = F.linear(z, weight, bias)
            else:
                y = forward(*given, False, eps, offset)
            ctx.save_for_backward(*given, y if gelu else None)
            return recompute.gelu(y, by_cpp) if gelu else y

        @staticmethod
        @_transforms.differentiable_again(_adaln_linear_again)
        def backward(ctx, grad):
            x, shift, scale, weight, _, step_shift, step_scale, before = ctx.saved_tensors
            of_x, of_shift, of_scale, of_weight, of_bias, *of_steps = ctx.needs_input_grad[:7]
            wanted = of_x, of_shift, of_scale, *of_steps
            found, grad_weight = (None,) * 5, None
            with _in_its_type(x):
                if ctx.gelu:
                    grad = recompute.gelu_gradient(grad, before, by_cpp)
                if of_weight:
                    z = adaln(x, shift, scale, step_shift, step_scale, ctx.eps)
                    grad_weight = recompute.weight_gradient(grad, z)
                if any(wanted):
                    whole = shift.shape == x.shape, scale.shape == x.shape
                    shared = is_shared(step_shift), is_shared(step_scale)
                    saved = rows_of(grad @ weight), x, scale, step_scale, ctx.eps
                    found = gradients(saved, wanted, whole, shared)
                grad_bias = recompute.bias_gradient(grad) if of_bias else None
            return *found[:3], grad_weight, grad_bias, *found[3:], None, None, None

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
    ) -> Tensor:
        """act(adaln(x) weight^T + bias)."""
        given = x, shift, scale, weight, bias, step_shift, step_scale
        run = forward
        if torch.is_grad_enabled() and any_requires_grad(*given):
            # One that a graph of torch.compile leaves open is a tensor.
            if isinstance(scale_offset, Tensor) or scale_offset != 1 or x.shape[-1] > widest:
                return reference.adaln_linear(
                    *given[:5],
                    step_shift=step_shift,
                    step_scale=step_scale,
                    activation=activation,
                    eps=eps,
                    scale_offset=scale_offset,
                )
            run = AdaLNLinear.apply
        return run(*given, activation == "gelu_tanh", eps, scale_offset)

    return adaln_linear


def linear_gated_residual(
    forward: Callable,
    gated_residual: Callable,
    gradients: Callable,
    *,
    by_cpp: bool,
    widest: int = _ANY,
) -> Callable:
    """The op, from a backend's.

    forward: (h, weight, bias, gate, residual, step_gate) -> x. gated_residual, gradients: as
    `ecar_kernels.adaln.autograd.gated_residual` takes them. by_cpp: as above.
    """

    class LinearGatedResidual(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h, weight, bias, gate, residual, step_gate):
            _, of_weight, _, of_gate, _, of_step = ctx.needs_input_grad
            branch = None
            if of_gate or of_step or (by_cpp and of_weight):
                with _in_its_type(h):
                    branch = F.linear(h, weight, bias)
                x = gated_residual(residual, branch, gate, step_gate)
            else:
                x = forward(h, weight, bias, gate, residual, step_gate)
            if not (of_gate or of_step):
                branch = None
                if not of_weight:  # then no gradient depends on h but by its shape
                    h = h.new_zeros(()).expand(h.shape)
            ctx.save_for_backward(h, weight, bias, gate, step_gate, branch)
            return x

        @staticmethod
        @_transforms.differentiable_again(_linear_gated_residual_again)
        def backward(ctx, grad):
            h, weight, _, gate, step_gate, branch = ctx.saved_tensors
            of_h, of_weight, of_bias, of_gate, of_residual, of_step = ctx.needs_input_grad
            of_branch = of_h or of_weight or of_bias
            found: Any = (None,) * 3
            if of_branch or of_gate or of_step:
                given = rows_of(grad)
                # That of the branch alone does not depend on its values.
                saved = given, given if branch is None else branch, gate, step_gate
                found = gradients(
                    saved,
                    (of_branch, of_gate, of_step),
                    (gate.shape == grad.shape,),
                    (is_shared(step_gate),),
                )
            grad_branch, grad_gate, grad_step = found
            with _in_its_type(h):
                return (
                    grad_branch @ weight if of_h else None,
                    recompute.weight_gradient(grad_branch, h) if of_weight else None,
                    recompute.bias_gradient(grad_branch) if of_bias else None,
                    grad_gate,
                    grad if of_residual else None,
                    grad_step,
                )

    def linear_gated_residual(
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor,
        residual: Tensor,
        *,
        step_gate: Tensor | None = None,
    ) -> Tensor:
        """residual + (gate + step_gate) (h weight^T + bias)."""
        given = h, weight, bias, gate, residual, step_gate
        if torch.is_grad_enabled() and any_requires_grad(*given):
            if residual.shape[-1] > widest:
                return reference.linear_gated_residual(*given[:5], step_gate=step_gate)
            return LinearGatedResidual.apply(*given)
        return forward(*given)

    return linear_gated_residual

"""What the autograd of the family's backends shares."""

from collections.abc import Callable

import torch

from ecar_kernels import _transforms
from ecar_kernels.stage_attention import reference


def differentiable(forward: Callable, backward: Callable) -> type[torch.autograd.Function]:
    """The Function of a backend's two ops: q, k, v and all results of the forward are kept.

    forward: (q, k, v, stage_lengths, scale) -> (out, lse, ...). backward: (grad, q, k, v, out,
    lse, ..., stage_lengths, scale) -> the gradients of q, k and v.
    """

    class StageAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, stage_lengths, scale):
            out, *others = forward(q, k, v, stage_lengths, scale)
            ctx.save_for_backward(q, k, v, out, *others)
            ctx.stage_lengths, ctx.scale = stage_lengths, scale
            return out

        @staticmethod
        @_transforms.differentiable_again(_gradients)
        def backward(ctx, grad):
            if grad.stride(-1) != 1:  # the gradient of a sum, say
                # Not contiguous(): an empty tensor counts as that whatever its strides.
                grad = grad.clone(memory_format=torch.contiguous_format)
            return (*backward(grad, *ctx.saved_tensors, ctx.stage_lengths, ctx.scale), None, None)

    return StageAttention


def _gradients(ctx, grad):
    def function(q, k, v):
        return reference.stage_attention(q, k, v, ctx.stage_lengths, scale=ctx.scale)

    return (*_transforms.gradients_of(function, ctx.saved_tensors[:3], grad), None, None)

"""What the autograd of the family's backends shares."""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable


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
        @once_differentiable
        def backward(ctx, grad):
            if grad.stride(-1) != 1:  # the gradient of a sum, say
                grad = grad.contiguous()
            return (*backward(grad, *ctx.saved_tensors, ctx.stage_lengths, ctx.scale), None, None)

    return StageAttention

"""The autograd of stage attention, over any backend."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ecar_kernels import _transforms
from ecar_kernels.stage_attention import reference


def stage_attention(forward: Callable, training: Callable, backward: Callable) -> Callable:
    """The op, from a backend's three; q, k, v and all results of `training` are kept.

    forward: (q, k, v, stage_lengths, scale) -> out. training: the same -> (out, lse, ...).
    backward: (grad, q, k, v, out, lse, ..., stage_lengths, scale) -> the gradients of q, k and v.
    """

    class StageAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, stage_lengths, scale):
            out, *others = training(q, k, v, stage_lengths, scale)
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

    def stage_attention(
        q: Tensor, k: Tensor, v: Tensor, stage_lengths: Sequence[int], *, scale: float | None = None
    ) -> Tensor:
        """q [B, Nq, H, D], k and v [B, N, H, D] -> [B, Nq, H, D]."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return StageAttention.apply(q, k, v, stage_lengths, scale)
        return forward(q, k, v, stage_lengths, scale)

    return stage_attention


def _gradients(ctx, grad):
    def function(q, k, v):
        return reference.stage_attention(q, k, v, ctx.stage_lengths, scale=ctx.scale)

    return (*_transforms.gradients_of(function, ctx.saved_tensors[:3], grad), None, None)

"""Stage attention without a mask: a stage's queries see a contiguous prefix of the keys.

On CPU tensors in C++, csrc/cpu/attention_isa.cpp. Elsewhere one dense attention for each stage, so
that scaled_dot_product_attention keeps its fast kernels, which a mask would rule out.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ecar_kernels import _native
from ecar_kernels.stage_attention._autograd import differentiable

if _native.why_not() is None:
    _forward = _native.op("stage_attention")
    _StageAttention = differentiable(
        _native.op("stage_attention_training"), _native.op("stage_attention_backward")
    )


def stage_attention(
    q: Tensor, k: Tensor, v: Tensor, stage_lengths: Sequence[int], *, scale: float | None = None
) -> Tensor:
    """q [B, Nq, H, D], k and v [B, N, H, D] -> [B, Nq, H, D]."""
    if not q.is_cpu:
        return _each_stage(q, k, v, stage_lengths, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _StageAttention.apply(q, k, v, stage_lengths, scale)
    return _forward(q, k, v, stage_lengths, scale)


def _each_stage(
    q: Tensor, k: Tensor, v: Tensor, stage_lengths: Sequence[int], scale: float | None
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    outputs, key_end = [], k.shape[2]
    query_end = q.shape[2]
    for length in reversed(stage_lengths):
        if query_end == 0:
            break
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, query_end - length : query_end],
                k[:, :, :key_end],
                v[:, :, :key_end],
                scale=scale,
            ).transpose(1, 2)
        )
        query_end -= length
        key_end -= length
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs[::-1], dim=1)


if _native.why_not() is None:

    @torch.library.register_fake("ecar::stage_attention")
    def _(q, k, v, stage_lengths, scale):
        return q.new_empty(q.shape)

    @torch.library.register_fake("ecar::stage_attention_training")
    def _(q, k, v, stage_lengths, scale):
        batch, queries, heads, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)

    @torch.library.register_fake("ecar::stage_attention_backward")
    def _(grad, q, k, v, out, lse, stage_lengths, scale):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

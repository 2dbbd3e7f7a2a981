"""Stage attention in C++, for CPU tensors: csrc/cpu/stage_attention_isa.cpp."""

import torch

from ecar_kernels import _native
from ecar_kernels.stage_attention import autograd

_native.require()

stage_attention = autograd.stage_attention(
    _native.op("stage_attention"),
    _native.op("stage_attention_training"),
    _native.op("stage_attention_backward"),
)


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

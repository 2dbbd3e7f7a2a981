"""The oracle of stage attention: an explicit block-causal mask, any floating dtype."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ecar_kernels._precision import widen


def block_causal_mask(
    stage_lengths: Sequence[int], num_queries: int, *, device: torch.device | None = None
) -> Tensor:
    """Boolean [num_queries, N], N = sum(stage_lengths): may the query see the key?

    A token of stage s sees every token of the stages up to s. The queries are the last
    `num_queries` of the N tokens.
    """
    ends = torch.tensor(tuple(itertools.accumulate(stage_lengths)), device=device)
    tokens = torch.arange(sum(stage_lengths), device=device)
    stage = torch.bucketize(tokens, ends, right=True)
    return stage[len(stage) - num_queries :, None] >= stage[None, :]


def stage_attention(
    q: Tensor, k: Tensor, v: Tensor, stage_lengths: Sequence[int], *, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T + mask) v over [B, N, H, D]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = block_causal_mask(stage_lengths, q.shape[1], device=q.device)
    scores = torch.einsum("bqhd,bkhd->bhqk", widen(q), widen(k)) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, widen(v)).to(q.dtype)

"""Stage attention by torch's scaled_dot_product_attention.

One dense attention for each stage, whose queries see a contiguous prefix of the keys, so that
PyTorch keeps its fast kernels, which a mask would rule out.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ecar_kernels.stage_attention import by_stage


def stage_attention(
    q: Tensor, k: Tensor, v: Tensor, stage_lengths: Sequence[int], *, scale: float | None = None
) -> Tensor:
    """q [B, Nq, H, D], k and v [B, N, H, D] -> [B, Nq, H, D]."""
    if scale is not None:
        q, scale = by_stage.positive(q, scale)
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

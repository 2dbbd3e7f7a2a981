"""Stage attention by the flash-attention kernels in PyTorch, on CUDA and on CPU tensors.

Its ops are called, not torch.nn.attention.sdpa_kernel, whose choice would hold for the
scaled_dot_product_attention of all threads.
"""

import torch
from torch import Tensor

from ecar_kernels.stage_attention import by_stage

_aten = torch.ops.aten


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _training(q, k, v, scale)[0]


def _training(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, scale=scale)
        return out.transpose(1, 2), lse, lse.new_empty(0), lse.new_empty(0)
    out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_flash_attention(
        *heads_first, scale=scale
    )
    return out.transpose(1, 2), lse, seed, offset


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads_first = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
    if q.device.type == "cpu":
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads_first, lse, 0.0, False, scale=scale
        )
    else:
        found = _aten._scaled_dot_product_flash_attention_backward(
            *heads_first,
            lse,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            False,
            seed,
            offset,
            scale=scale,
        )
    grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in found)
    return grad_q, grad_k, grad_v


stage_attention = by_stage.stage_attention(
    "sdpa_flash", by_stage.Dense(_forward, _training, _backward, seeded=True)
)

"""Stage attention by cuDNN's kernels in PyTorch, whose ops are called as sdpa_flash.py's are."""

import torch
from torch import Tensor

from ecar_kernels.stage_attention import by_stage

_aten = torch.ops.aten


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _run(q, k, v, scale, keep_lse=False)[0].transpose(1, 2)


def _training(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ...]:
    out, lse, _, _, _, _, seed, offset, _ = _run(q, k, v, scale, keep_lse=True)
    return out.transpose(1, 2), lse.squeeze(-1), seed, offset


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float, *, keep_lse: bool) -> tuple:
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    return _aten._scaled_dot_product_cudnn_attention(*heads_first, None, keep_lse, scale=scale)


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
    found = _aten._scaled_dot_product_cudnn_attention_backward(
        *[x.transpose(1, 2) for x in (grad, q, k, v, out)],
        lse.unsqueeze(-1),
        seed,
        offset,
        None,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        False,
        scale=scale,
    )
    grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in found)
    return grad_q, grad_k, grad_v


stage_attention = by_stage.stage_attention(
    "sdpa_cudnn", by_stage.Dense(_forward, _training, _backward, seeded=True)
)

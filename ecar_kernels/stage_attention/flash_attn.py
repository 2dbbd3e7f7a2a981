"""Stage attention by the package flash-attn, version 2.7 or later."""

import torch
from flash_attn.flash_attn_interface import _flash_attn_backward, flash_attn_func
from torch import Tensor

from ecar_kernels.stage_attention import by_stage


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return flash_attn_func(q, k, v, softmax_scale=scale)


def _training(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # Without dropout that returns no probabilities, but the logsumexp that backward takes.
    out, lse, _ = flash_attn_func(q, k, v, softmax_scale=scale, return_attn_probs=True)
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same bits at every call, which costs the library some speed and memory."""
    grad_q, grad_k, grad_v = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)
    )
    _flash_attn_backward(
        dout=grad,
        q=q,
        k=k,
        v=v,
        out=out,
        softmax_lse=lse,
        dq=grad_q,
        dk=grad_k,
        dv=grad_v,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=True,
    )
    return grad_q, grad_k, grad_v


stage_attention = by_stage.stage_attention(
    "flash_attn", by_stage.Dense(_forward, _training, _backward)
)

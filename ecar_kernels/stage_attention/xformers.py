"""Stage attention by the package xformers, by whichever of its kernels it picks."""

from torch import Tensor
from xformers.ops import (
    memory_efficient_attention_backward,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
)

from ecar_kernels.stage_attention import by_stage


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return memory_efficient_attention_forward(q, k, v, scale=scale)


def _training(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return memory_efficient_attention_backward(grad, out, lse, q, k, v, scale=scale)


stage_attention = by_stage.stage_attention(
    "xformers", by_stage.Dense(_forward, _training, _backward)
)

"""The oracles of the fused GEMMs: plain PyTorch, any floating dtype."""

import torch.nn.functional as F
from torch import Tensor

from ecar_kernels.adaln.reference import combine, gated_residual, modulated


def adaln_linear(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    step_shift: Tensor | None = None,
    step_scale: Tensor | None = None,
    activation: str | None = None,
    eps: float = 1e-6,
    scale_offset: float = 1.0,
) -> Tensor:
    """act(adaln(x) weight^T + bias), adaln with scale_offset + scale for 1 + scale."""
    y = modulated(x, combine(shift, step_shift), scale_offset + combine(scale, step_scale), eps)
    y = F.linear(y, weight, bias)
    return F.gelu(y, approximate="tanh") if activation == "gelu_tanh" else y


def linear_gated_residual(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    residual: Tensor,
    *,
    step_gate: Tensor | None = None,
) -> Tensor:
    """residual + (gate + step_gate) (h weight^T + bias)."""
    return gated_residual(residual, F.linear(h, weight, bias), gate, step_gate=step_gate)

"""The oracles of the adaLN family: plain PyTorch, any floating dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ecar_kernels import _numbers
from ecar_kernels._precision import widen


def adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    step_shift: Tensor | None = None,
    step_scale: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """y = LN(x) (1 + scale + step_scale) + shift + step_shift."""
    return modulated(x, combine(shift, step_shift), 1 + combine(scale, step_scale), eps)


def modulated(x: Tensor, shift: Tensor, factor: Tensor, eps: float) -> Tensor:
    """LN(x) factor + shift."""
    wide = widen(x)
    if torch.compiler.is_compiling() and not _numbers.is_static(eps):
        # layer_norm's own eps is a constant to torch.compile: a graph for each value.
        variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
        normal = (wide - mean) * torch.rsqrt(variance + eps)
    else:
        normal = F.layer_norm(wide, x.shape[-1:], eps=eps)
    return (normal * factor + shift).to(x.dtype)


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, *, step_gate: Tensor | None = None
) -> Tensor:
    """x + (gate + step_gate) branch."""
    return (widen(x) + combine(gate, step_gate) * widen(branch)).to(x.dtype)


def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    step_gate: Tensor | None = None,
    step_shift: Tensor | None = None,
    step_scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The new residual stream, and its adaLN: the two ops above in a row."""
    x = gated_residual(x, branch, gate, step_gate=step_gate)
    y = adaln(x, shift, scale, step_shift=step_shift, step_scale=step_scale, eps=eps)
    return x, y


def combine(spatial: Tensor, step: Tensor | None) -> Tensor:
    """spatial [B, N, C] or [B, 1, C], plus step [1, 1, C] or [B, 1, C], in the wide type.

    The result broadcasts against tokens [B, N, C].
    """
    return widen(spatial) if step is None else widen(spatial) + widen(step)

"""The boundary between two network calls in plain PyTorch, any floating dtype."""

import torch.nn.functional as F
from torch import Tensor

from ecar_kernels.adaln.reference import adaln
from ecar_kernels.flow_step.reference import guided_step


def flow_boundary(
    x: Tensor,
    state: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    embed_weight: Tensor,
    embed_bias: Tensor,
    positions: Tensor,
    dt: float | Tensor,
    *,
    step_shift: Tensor | None = None,
    step_scale: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    eps: float = 1e-6,
    previous: Tensor | None = None,
    ratio: float | Tensor = 0.0,
    return_velocity: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """v = adaln(x) weight^T + bias;  state' = euler_step(state, v, ..);  state' embed^T + bias +
    positions."""
    y = adaln(x, shift, scale, step_shift=step_shift, step_scale=step_scale, eps=eps)
    velocity = F.linear(y, weight, bias)
    moved, v = guided_step(state, velocity, dt, guidance_scale, previous, ratio)
    moved = moved.to(state.dtype)
    embedded = F.linear(moved.to(x.dtype), embed_weight, embed_bias) + positions
    results = moved, embedded.repeat(x.shape[0] // max(state.shape[0], 1), 1, 1)
    return (*results, v.to(state.dtype, copy=True)) if return_velocity else results

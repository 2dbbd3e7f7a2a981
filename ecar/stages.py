"""Stage times, the noise pyramid and the flows' end points (design, sections 3.1 to 3.3).

Notation: S stages counted from 1; ``D_s`` the data at stage s's resolution; ``n_s`` its noise;
``a_s`` and ``b_s`` the times at which stage s starts and ends. All images are [B, C, h, w].
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ecar_kernels import haar_high_pass

__all__ = [
    "data_pyramid",
    "down",
    "end_points",
    "end_time",
    "global_time",
    "haar_high_pass",
    "interpolate",
    "noise_pyramid",
    "start_time",
    "transition",
    "up",
]


Time = TypeVar("Time", float, Tensor)


def start_time(stage: int, num_stages: int) -> float:
    """a_s = (s - 1) / S."""
    return (stage - 1) / num_stages


def end_time(stage: int, num_stages: int) -> float:
    """b_s = 2 a_{s+1} / (1 + a_{s+1}) for s < S, and b_S = 1.

    Later than a_{s+1}: going up one level makes the state noisier.
    """
    if stage == num_stages:
        return 1.0
    following = start_time(stage + 1, num_stages)
    return 2 * following / (1 + following)


def global_time(stage: int, num_stages: int, tau: Time) -> Time:
    """t = (s - 1 + tau) / S, the time that the flow head of stage s is told."""
    return (stage - 1 + tau) / num_stages


def down(x: Tensor) -> Tensor:
    """2x2 average pooling: [B, C, 2h, 2w] -> [B, C, h, w]."""
    return F.avg_pool2d(x, 2)


def up(x: Tensor) -> Tensor:
    """Nearest neighbour, twice the side: [B, C, h, w] -> [B, C, 2h, 2w]."""
    return x.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


def data_pyramid(data: Tensor, num_stages: int) -> list[Tensor]:
    """D_S = data, D_{s-1} = down(D_s); coarse to fine (Eq. 3.10)."""
    levels = [data]
    for _ in range(num_stages - 1):
        levels.insert(0, down(levels[0]))
    return levels


def noise_pyramid(noise: Tensor, num_stages: int) -> list[Tensor]:
    """n_S = noise, n_{s-1} = 2 down(n_s); coarse to fine (Eq. 3.11).

    The factor 2 makes it the orthonormal Haar low-pass, so that each level is N(0, I).
    """
    levels = [noise]
    for _ in range(num_stages - 1):
        levels.insert(0, 2 * down(levels[0]))
    return levels


def end_points(data: Tensor, noise: Tensor, num_stages: int) -> list[tuple[Tensor, Tensor]]:
    """(start_s, end_s) of every stage's flow, coarse to fine (section 3.3).

    start_1 = n_1, start_s = a_s up(D_{s-1}) + (1 - a_s) n_s, end_s = b_s D_s + (1 - b_s) n_s.

    Args:
        data: F1 [B, C, H, W], the full-resolution latent.
        noise: n_S [B, C, H, W], standard normal.
    """
    clean, noises = data_pyramid(data, num_stages), noise_pyramid(noise, num_stages)
    points = []
    for stage in range(1, num_stages + 1):
        a, b, n = start_time(stage, num_stages), end_time(stage, num_stages), noises[stage - 1]
        start = n if stage == 1 else a * up(clean[stage - 2]) + (1 - a) * n
        points.append((start, b * clean[stage - 1] + (1 - b) * n))
    return points


def interpolate(start: Tensor, end: Tensor, tau: Tensor) -> Tensor:
    """x_tau = (1 - tau) start + tau end, with tau [B] in [0, 1] (Eq. 3.12)."""
    tau = tau.view(-1, 1, 1, 1)
    return torch.lerp(start, end, tau.to(start.dtype))


def transition(end: Tensor, time: float, high_pass: Tensor) -> Tensor:
    """start_{s+1} = (1 + t)/2 up(end_s) + (1 - t) h_{s+1}, with t = a_{s+1} (section 3.3)."""
    return (1 + time) / 2 * up(end) + (1 - time) * high_pass

"""The moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["EMA"]

Tensors = tuple[Tensor, ...] | list[Tensor]


class EMA(AveragedModel):
    """Exponential moving average with a warm-up: decay_t = min(decay, (1 + t) / (10 + t)).

    t is the number of models averaged so far; the model given at construction is the first.
    ``n_averaged`` stays on the CPU, so that an update does not wait for the GPU.

    Args:
        model: its parameters and buffers are copied.
        decay: in [0, 1].
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"argument 'decay': expected a number in [0, 1], got {decay}")
        super().__init__(model, multi_avg_fn=self._lerp)
        self.decay = decay
        self.n_averaged.fill_(1)
        self.module.requires_grad_(False).eval()

    def decay_at(self, t: int) -> float:
        """The decay of the update that follows ``t`` averaged models."""
        return min(self.decay, (1 + t) / (10 + t))

    @torch.no_grad()
    def _lerp(self, averaged: Tensors, current: Tensors, _: Tensor | int) -> None:
        torch._foreach_lerp_(averaged, current, 1 - self.decay_at(int(self.n_averaged)))

"""Stage weights that are given, or that follow the stages' losses; gradnorm.py has GradNorm's.

By uncertainty (Kendall, Gal and Cipolla, 2018) each stage's error is taken to be normal with a
variance of its own, v_s = exp(eta_s), which is learned by gradient descent on the negative
log-likelihood, up to constants

    1/2 sum_s (L_s / v_s + eta_s)

A stage's weight is 1 / v_s, renormalised so that the weights sum to S as GradNorm's do: with the
variances at their optimum, v_s = L_s, every stage adds the same to the sum of losses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ecar.training.gradnorm import Saved, adam

__all__ = ["FixedWeights", "Uncertainty"]


class FixedWeights(Saved):
    """Weights that stay: float32 [S]."""

    name = "fixed"

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def update(self, losses: Tensor) -> None:
        pass


class Uncertainty(Saved):
    """The stages' variances and how they move. All state is tensors on one device, no host sync.

    Args:
        stages: S.
        learning_rate: Adam's step on the log-variances.

    Attributes:
        log_variances: eta, float32 [S]; 0 at first.
    """

    name = "uncertainty"
    saved = ("log_variances", "first_moment", "second_moment", "steps")

    def __init__(
        self, stages: int, *, learning_rate: float, device: torch.device | str = "cpu"
    ) -> None:
        self.learning_rate = learning_rate
        self.log_variances = torch.zeros(stages, device=device)
        self.first_moment = torch.zeros(stages, device=device)
        self.second_moment = torch.zeros(stages, device=device)
        self.steps = torch.zeros((), device=device)

    @property
    def weights(self) -> Tensor:
        """Float32 [S], positive, their sum S."""
        return len(self.log_variances) * torch.softmax(-self.log_variances, dim=0)

    @torch.no_grad()
    def update(self, losses: Tensor) -> None:
        """Move the variances by one step, given the unweighted losses [S] of the global batch."""
        gradient = (1 - losses * torch.exp(-self.log_variances)) / 2
        self.steps += 1
        move, self.first_moment, self.second_moment = adam(
            gradient, self.first_moment, self.second_moment, self.steps, self.learning_rate
        )
        self.log_variances = self.log_variances - move

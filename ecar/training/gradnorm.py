"""GradNorm (Chen et al., 2018): stage weights that let all stages learn at like rates.

With W the last weight that all stages share, n_s = ||dL_s/dW|| and G_s = w_s n_s,

    r_s = (L_s(t) / L_s(0)) / mean_i (L_i(t) / L_i(0))      the inverse training rate
    L_grad = sum_s |G_s - mean_i(G_i) r_s^alpha|            the target held constant

so dL_grad/dw_s = n_s sign(G_s - target_s). A step on w by Adam, then w is kept positive and
renormalised to sum S.

Under data parallelism and accumulation the gradients dL_s/dW are averaged, not their norms: so
n_s is that of the global batch, however it was split.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GradNorm"]

_BETAS = (0.9, 0.999)
_EPS = 1e-8
_LOWEST = 1e-3  # a weight never falls below this before the renormalisation


def adam(
    gradient: Tensor, first: Tensor, second: Tensor, steps: Tensor, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What Adam subtracts at a step of this rate, and its moments after it.

    Args:
        first, second: the moments before.
        steps: taken, this one included.
    """
    m = _BETAS[0] * first + (1 - _BETAS[0]) * gradient
    v = _BETAS[1] * second + (1 - _BETAS[1]) * gradient**2
    m_hat = m / (1 - _BETAS[0] ** steps)
    v_hat = v / (1 - _BETAS[1] ** steps)
    return rate * m_hat / (v_hat.sqrt() + _EPS), m, v


class Saved:
    """State that is a few tensors, by their names in ``saved``."""

    saved: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.saved}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in self.saved:
            getattr(self, name).copy_(state[name])


class GradNorm(Saved):
    """The stage weights and how they move. All state is tensors on one device, no host sync.

    Args:
        stages: S.
        alpha: strength of the pull towards equal training rates; 0 equalises the norms.
        learning_rate: Adam's step on the weights.

    Attributes:
        weights: float32 [S], positive, their sum S.
    """

    name = "gradnorm"
    saved = ("weights", "initial_losses", "first_moment", "second_moment", "steps")

    def __init__(
        self, stages: int, *, alpha: float, learning_rate: float, device: torch.device | str = "cpu"
    ) -> None:
        self.alpha = alpha
        self.learning_rate = learning_rate
        self.weights = torch.ones(stages, device=device)
        self.initial_losses = torch.zeros(stages, device=device)
        self.first_moment = torch.zeros(stages, device=device)
        self.second_moment = torch.zeros(stages, device=device)
        self.steps = torch.zeros((), device=device)

    def gradient(self, losses: Tensor, norms: Tensor) -> Tensor:
        """dL_grad/dw [S] from the stage losses [S] and the norms n_s [S], both float32."""
        weighted = self.weights * norms
        ratio = losses / self.initial_losses
        rate = ratio / ratio.mean()
        target = weighted.mean() * rate**self.alpha
        return norms * torch.sign(weighted - target)

    @torch.no_grad()
    def update(self, losses: Tensor, norms: Tensor) -> None:
        """Move the weights by one step.

        Args:
            losses: float32 [S], unweighted, of the global batch.
            norms: float32 [S], n_s of the global batch. Where any is not finite (an overflow
                that fp16's loss scale skips) nothing moves.
        """
        first = self.steps == 0
        self.initial_losses = torch.where(first, losses, self.initial_losses)
        gradient = self.gradient(losses, norms)
        steps = self.steps + 1
        move, m, v = adam(
            gradient, self.first_moment, self.second_moment, steps, self.learning_rate
        )
        weights = (self.weights - move).clamp(min=_LOWEST)
        weights = weights * (len(weights) / weights.sum())
        sound = torch.isfinite(weights).all() & torch.isfinite(norms).all()
        self.steps = torch.where(sound, steps, self.steps)
        self.first_moment = torch.where(sound, m, self.first_moment)
        self.second_moment = torch.where(sound, v, self.second_moment)
        self.weights = torch.where(sound, weights, self.weights)

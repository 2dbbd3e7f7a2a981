"""Solvers: where the steps of a stage lie, and what a step does to the state (design.md, 3.6).

All that tells one solver from another is here; engines ask, and know none by name. Every stage
has a solver of its own, so what a multistep solver keeps of earlier steps ends with the stage.

    euler   x <- x + h v(x, tau)
    heun    x <- x + h (v(x, tau) + v(x + h v, tau + h)) / 2
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

import ecar_kernels
from ecar import stages

__all__ = [
    "SOLVERS",
    "Euler",
    "Heun",
    "Solver",
    "Step",
    "place_steps",
    "solver_class",
    "step_times",
]

# (x, step, at) -> the velocity of a state x of the step `step`, at the solver's time number `at`;
# with guidance it has twice as many rows as x, conditional first.
Velocity = Callable[[Tensor, int, int], Tensor]


class Step(NamedTuple):
    """Where a step lies within its stage."""

    tau: float  # at which it begins
    dt: float  # how long it is


def place_steps(count: int) -> tuple[Step, ...]:
    """The steps of a stage, of equal length, from tau = 0 to 1."""
    return tuple(Step(index / count, 1 / count) for index in range(count))


def step_times(counts: Sequence[int], stage: int) -> list[float]:
    """Global times at which the steps of ``stage`` begin."""
    return [
        stages.global_time(stage, len(counts), step.tau) for step in place_steps(counts[stage - 1])
    ]


class Solver(ABC):
    """The steps of one stage.

    Args:
        steps: of ``place_steps``.

    Class attributes:
        fused: a step is one velocity and one update of the state, so that one op
            (``flow_boundary``) may do both, with the state in the token layout.
    """

    fused: ClassVar[bool] = False

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)

    def taus(self) -> list[float]:
        """Times within the stage at which it takes velocities; a step's own is at its index."""
        return [step.tau for step in self.steps]

    @abstractmethod
    def slope(self, velocity: Velocity, x: Tensor, step: int, scale: float | Tensor) -> Tensor:
        """What the step multiplies by its length: as a velocity, not yet guided."""

    def advance(self, x: Tensor, slope: Tensor, step: int, scale: float | Tensor) -> Tensor:
        """The state after the step, x [B, C, h, w]; ``scale`` is the guidance's."""
        return _euler_step(x, slope, self.steps[step].dt, scale)

    def jump(
        self,
        x: Tensor,
        slope: Tensor,
        step: int,
        scale: float | Tensor,
        *,
        time: float,
        stage: int,
        seeds: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The state after the last step, and the start of the next stage, in one op.

        time, stage, seeds: as in ``ecar_kernels.upsample_renoise_euler``.
        """
        slope, scale = _guide(slope, scale)
        return ecar_kernels.upsample_renoise_euler(
            x, slope, self.steps[step].dt, time=time, stage=stage, seeds=seeds, guidance_scale=scale
        )

    def boundary(
        self,
        flow_boundary: Callable[..., tuple[Tensor, Tensor]],
        step: int,
        *tensors: Tensor,
        **options: object,
    ) -> tuple[Tensor, Tensor]:
        """``advance`` of a ``fused`` solver in the token layout: (state, embedded tokens).

        tensors, options: of ``ecar_kernels.flow_boundary``, without ``dt``.
        """
        return flow_boundary(*tensors, self.steps[step].dt, **options)


class Euler(Solver):
    """Order 1."""

    fused = True

    def slope(self, velocity: Velocity, x: Tensor, step: int, scale: float | Tensor) -> Tensor:
        return velocity(x, step, step)


class Heun(Solver):
    """Order 2, of two network calls a step."""

    def taus(self) -> list[float]:
        # The second call is at the next step's time; the last one's, at the stage's end.
        return [*super().taus(), 1.0]

    def slope(self, velocity: Velocity, x: Tensor, step: int, scale: float | Tensor) -> Tensor:
        v = velocity(x, step, step)
        ahead = _euler_step(x, v, self.steps[step].dt, scale)
        return (v + velocity(ahead, step, step + 1)) / 2


_SOLVERS: dict[str, type[Solver]] = {"euler": Euler, "heun": Heun}
SOLVERS = tuple(_SOLVERS)


def solver_class(name: str) -> type[Solver]:
    """The class of a name out of ``SOLVERS``."""
    return _SOLVERS[name]


def _euler_step(x: Tensor, velocity: Tensor, dt: float, scale: float | Tensor) -> Tensor:
    velocity, scale = _guide(velocity, scale)
    return ecar_kernels.euler_step(x, velocity, dt, guidance_scale=scale)


def _guide(velocity: Tensor, scale: float | Tensor) -> tuple[Tensor, float | Tensor]:
    """The guidance itself where the scale is data on the CPU, where the ops take it as a number.

    A run that was recorded would keep that number.
    """
    if velocity.is_cuda or not isinstance(scale, Tensor):
        return velocity, scale
    conditional, unconditional = velocity.chunk(2)
    return torch.lerp(unconditional, conditional, scale), 1.0

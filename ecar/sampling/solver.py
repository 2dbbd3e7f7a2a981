"""Solvers: where the steps of a stage lie, and what a step does to the state (design.md, 3.6).

All that tells one solver from another is here; engines ask, and know none by name. Every stage
has a solver of its own, so what a multistep solver keeps of earlier steps ends with the stage.

    euler   x <- x + h v(x, tau)
    heun    x <- x + h (v(x, tau) + v(x + h v, tau + h)) / 2
    ab2     x <- x + h ((1 + r/2) v(x, tau) - (r/2) v'),   r = h / h'

where v' and h' are the velocity and the length of the step before. ab2 is Adams-Bashforth's method
of order 2 with variable steps (Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I,
III.5): one velocity a step; the first step of a stage is Euler's.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

import ecar_kernels
from ecar import stages

__all__ = [
    "AB2",
    "SOLVERS",
    "Euler",
    "Grid",
    "Heun",
    "Solver",
    "Step",
    "check_grid",
    "place_steps",
    "solver_class",
    "step_times",
]

# (x, step, at) -> the velocity of a state x of the step `step`, at the solver's time number `at`;
# with guidance it has twice as many rows as x, conditional first.
Velocity = Callable[[Tensor, int, int], Tensor]


# Where steps lie: the exponent p of tau_i = (i / N)^p, or for each stage the times at which its
# steps begin, the first 0, all below 1.
Grid = float | tuple[tuple[float, ...], ...]


class Step(NamedTuple):
    """Where a step lies within its stage."""

    tau: float  # at which it begins
    dt: float  # how long it is


def place_steps(counts: Sequence[int], stage: int, grid: Grid = 1.0) -> tuple[Step, ...]:
    """The steps of ``stage`` (from 1), from tau = 0 to 1; counts: steps of every stage."""
    count = counts[stage - 1]
    if grid == 1:
        return tuple(Step(index / count, 1 / count) for index in range(count))
    if isinstance(grid, tuple):
        taus = [*grid[stage - 1], 1.0]
    else:
        taus = [(index / count) ** grid for index in range(count + 1)]
    return tuple(Step(tau, after - tau) for tau, after in itertools.pairwise(taus))


def check_grid(grid: object, counts: Sequence[int]) -> Grid:
    """The grid, as ``place_steps`` takes it.

    Raises:
        TypeError, ValueError: it is no positive exponent, and no list of increasing times in
            [0, 1) for each stage, of as many times as the stage has steps, from 0 on.
    """
    if not isinstance(grid, bool) and isinstance(grid, (int, float)):
        if not 0 < grid < math.inf:
            raise ValueError(f"argument 'grid': expected a positive exponent, got {grid}")
        return float(grid)
    if isinstance(grid, (str, bytes)) or not isinstance(grid, Sequence):
        raise TypeError(
            "argument 'grid': expected a positive exponent or each stage's times, got "
            f"{type(grid).__name__}"
        )
    if len(grid) != len(counts):
        raise ValueError(
            f"argument 'grid': expected the times of each of {len(counts)} stages, got {len(grid)}"
        )
    found = []
    for stage, (times, count) in enumerate(zip(grid, counts, strict=True), start=1):
        taus = tuple(times) if isinstance(times, Sequence) else ()
        if not all(isinstance(tau, (int, float)) for tau in taus) or len(taus) != count:
            raise ValueError(
                f"argument 'grid': expected {count} times at stage {stage}, which has as many "
                f"steps, got {times!r}"
            )
        if taus[0] != 0 or not all(a < b for a, b in itertools.pairwise((*taus, 1.0))):
            raise ValueError(
                f"argument 'grid': expected increasing times from 0 on, below 1, at stage {stage}, "
                f"got {list(taus)}"
            )
        found.append(tuple(map(float, taus)))
    return tuple(found)


def step_times(counts: Sequence[int], stage: int, grid: Grid = 1.0) -> list[float]:
    """Global times at which the steps of ``stage`` begin."""
    placed = place_steps(counts, stage, grid)
    return [stages.global_time(stage, len(counts), step.tau) for step in placed]


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

    def restart(self) -> None:  # noqa: B027 (most remember nothing)
        """Forget earlier steps: the state that comes next is not theirs."""

    @abstractmethod
    def slope(
        self, velocity: Velocity, x: Tensor, step: int, scale: float | Tensor
    ) -> tuple[Tensor, float | Tensor]:
        """What the step multiplies by its length, as a velocity, and the guidance's scale that is
        still to be applied to it."""

    def advance(self, x: Tensor, slope: Tensor, step: int, scale: float | Tensor) -> Tensor:
        """The state after the step, x [B, C, h, w]; slope and scale are ``slope``'s."""
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

    def slope(
        self, velocity: Velocity, x: Tensor, step: int, scale: float | Tensor
    ) -> tuple[Tensor, float | Tensor]:
        return velocity(x, step, step), scale


class Heun(Solver):
    """Order 2, of two network calls a step."""

    def taus(self) -> list[float]:
        # The second call is at the next step's time; the last one's, at the stage's end.
        return [*super().taus(), 1.0]

    def slope(
        self, velocity: Velocity, x: Tensor, step: int, scale: float | Tensor
    ) -> tuple[Tensor, float | Tensor]:
        v = velocity(x, step, step)
        ahead = _euler_step(x, v, self.steps[step].dt, scale)
        return (v + velocity(ahead, step, step + 1)) / 2, scale


class AB2(Solver):
    """Order 2, of one network call a step; it remembers the guided velocity of the step before."""

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__(steps)
        self._before: Tensor | None = None

    def restart(self) -> None:
        self._before = None

    def slope(
        self, velocity: Velocity, x: Tensor, step: int, scale: float | Tensor
    ) -> tuple[Tensor, float | Tensor]:
        v, before = guided(velocity(x, step, step), scale, len(x)), self._before
        self._before = v
        if before is None:
            return v, 1.0
        ratio = self.steps[step].dt / self.steps[step - 1].dt
        return torch.lerp(before, v, 1 + ratio / 2), 1.0


def guided(velocity: Tensor, scale: float | Tensor, batch: int) -> Tensor:
    """v_u + scale (v_c - v_u) of a velocity with 2 ``batch`` rows, v_c first; of one with
    ``batch`` rows, itself."""
    if len(velocity) == batch:
        return velocity
    conditional, unconditional = velocity.chunk(2)
    return torch.lerp(unconditional, conditional, scale)


_SOLVERS: dict[str, type[Solver]] = {"euler": Euler, "heun": Heun, "ab2": AB2}
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
    return guided(velocity, scale, len(velocity) // 2), 1.0

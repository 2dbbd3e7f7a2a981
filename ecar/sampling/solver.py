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
from typing import Any, ClassVar, NamedTuple

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
    """Where a step lies within its stage. A run that a CUDA graph replays has its numbers as device
    data, 0-dim float32 tensors."""

    tau: float  # at which it begins
    dt: float | Tensor  # how long it is
    ratio: float | Tensor = 0.0  # of that to the length of the step before; 0 at the first


def place_steps(counts: Sequence[int], stage: int, grid: Grid = 1.0) -> tuple[Step, ...]:
    """The steps of ``stage`` (from 1), from tau = 0 to 1; counts: steps of every stage."""
    count = counts[stage - 1]
    if isinstance(grid, tuple):
        taus = [*grid[stage - 1], 1.0]
    else:
        taus = [(index / count) ** grid for index in range(count + 1)]
    if grid == 1:
        lengths = [1 / count] * count
    else:
        lengths = [after - tau for tau, after in itertools.pairwise(taus)]
    ratios = [0.0, *(length / before for before, length in itertools.pairwise(lengths))]
    return tuple(map(Step, taus, lengths, ratios))


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
        steps: of ``place_steps``, or with device data in the place of their numbers.

    Class attributes:
        fused: a step is one velocity and one update of the state, so that one op
            (``flow_boundary``) may do both, with the state in the token layout.
        history: it is fused, and a step has the guided velocity of the one before, with ``ratio``,
            in its update.
    """

    fused: ClassVar[bool] = False
    history: ClassVar[bool] = False

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self._before: Tensor | None = None  # the guided velocity of the step before

    def taus(self) -> list[float]:
        """Times within the stage at which it takes velocities; a step's own is at its index."""
        return [step.tau for step in self.steps]

    def ratio(self, step: int) -> float | Tensor:
        """Of the step's length to that of the one before; 0 for one that needs no history."""
        return self.steps[step].ratio if self.history else 0.0

    def restart(self) -> None:
        """Forget earlier steps: the state that comes next is not theirs."""
        self._before = None

    @abstractmethod
    def slope(
        self, velocity: Velocity, x: Tensor, step: int, scale: float | Tensor
    ) -> tuple[Tensor, float | Tensor]:
        """What the step multiplies by its length, as a velocity, and the guidance's scale that is
        still to be applied to it."""

    def advance(self, x: Tensor, slope: Tensor, step: int, scale: float | Tensor) -> Tensor:
        """The state after the step, x [B, C, h, w]; slope and scale are ``slope``'s."""
        (x,) = self._update(ecar_kernels.euler_step, step, x, slope, guidance_scale=scale)
        return x

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
        noise = {"time": time, "stage": stage, "seeds": seeds}
        op = ecar_kernels.upsample_renoise_euler
        end, start = self._update(op, step, x, slope, guidance_scale=scale, **noise)
        return end, start

    def boundary(
        self,
        flow_boundary: Callable[..., tuple[Tensor, ...]],
        step: int,
        *tensors: Tensor,
        **options: object,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``advance`` of a ``fused`` solver in the token layout: (state, embedded tokens, and their
        statistics if the op leaves them).

        tensors, options: of ``ecar_kernels.flow_boundary``, without ``dt`` and a history.
        """
        state, embedded, *left = self._update(flow_boundary, step, *tensors, **options)
        return state, embedded, left[0] if left else None

    def _update(
        self, op: Callable[..., Any], step: int, *tensors: Tensor, **options: object
    ) -> Sequence[Tensor]:
        """The results of an op that takes the step, which has and leaves the solver's history."""
        if self._before is not None:
            options |= {"previous": self._before, "ratio": self.ratio(step)}
        kept = self.history and step + 1 < len(self.steps)
        if kept:
            options["return_velocity"] = True
        results = op(*tensors, self.steps[step].dt, **options)
        if kept:
            *results, self._before = results
        return (results,) if isinstance(results, Tensor) else results


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
        ahead = ecar_kernels.euler_step(x, v, self.steps[step].dt, guidance_scale=scale)
        return (v + velocity(ahead, step, step + 1)) / 2, scale


class AB2(Euler):
    """Order 2, of one network call a step: Euler's with the velocity before."""

    history = True


_SOLVERS: dict[str, type[Solver]] = {"euler": Euler, "heun": Heun, "ab2": AB2}
SOLVERS = tuple(_SOLVERS)


def solver_class(name: str) -> type[Solver]:
    """The class of a name out of ``SOLVERS``."""
    return _SOLVERS[name]

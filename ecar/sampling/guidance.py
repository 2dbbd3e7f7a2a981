"""What a run of the sampler is told: guidance and steps, checked, and their defaults.

The defaults of the solver, its grid and its steps are here and nowhere else; `ecar steps` measured
them (docs/steps.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ecar.sampling.solver import SOLVERS, Grid, check_grid, step_times

__all__ = ["PAPER", "SCHEDULES", "Guidance", "Steps", "plan_steps", "split_steps"]

SCHEDULES = ("constant", "linear")

# Steps of all stages together, of each stage, or the paper's protocol.
Steps = int | Sequence[int] | Literal["paper"]

DEFAULT_STEPS = 30
DEFAULT_SOLVER = "ab2"
DEFAULT_GRID = 1.6
DEFAULT_RATIO = 0.75  # a stage's steps over those of the stage before

PAPER: Literal["paper"] = "paper"  # 250 even Euler steps, as many at each stage
PAPER_STEPS = 250
PAPER_SOLVER = "euler"
PAPER_GRID = 1.0


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: v = v_u + w (v_c - v_u), by stage and time.

    Args:
        scale: w; 1 runs no unconditional rows.
        schedule: "constant", or "linear" over stages: 1 at the first, ``scale`` at the last.
        interval: global times [low, high] outside which there is no guidance.
    """

    scale: float = 1.0
    schedule: str = "constant"
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _require_finite("guidance_scale", self.scale)
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"argument 'guidance_schedule': expected one of {SCHEDULES}, got {self.schedule!r}"
            )
        interval = self.interval
        if isinstance(interval, (str, bytes)) or not isinstance(interval, Sequence):
            raise TypeError(f"argument 'guidance_interval': expected two numbers, got {interval!r}")
        if len(interval) != 2:
            raise ValueError(
                f"argument 'guidance_interval': expected two numbers, got {interval!r}"
            )
        for bound in interval:
            _require_finite("guidance_interval", bound)
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                "argument 'guidance_interval': expected 0 <= low <= high <= 1, got "
                f"{tuple(interval)}"
            )

    def at(self, stage: int, num_stages: int, time: float) -> float:
        """w for a step of ``stage`` that begins at the global time ``time``."""
        low, high = self.interval
        if not low <= time <= high:
            return 1.0
        if self.schedule == "linear" and num_stages > 1:
            return 1 + (self.scale - 1) * (stage - 1) / (num_stages - 1)
        return float(self.scale)

    def scales(self, counts: Sequence[int], grid: Grid = 1.0) -> tuple[tuple[float, ...], ...]:
        """w of every step of every stage, for stages of ``counts`` steps."""
        return tuple(
            tuple(self.at(stage, len(counts), time) for time in step_times(counts, stage, grid))
            for stage in range(1, len(counts) + 1)
        )


class StepPlan(NamedTuple):
    """Steps of each stage, the solver, and where the steps lie."""

    counts: list[int]
    solver: str
    grid: Grid


def plan_steps(
    steps: Steps, solver: str | None, grid: Any, num_stages: int, *, name: str = "steps"
) -> StepPlan:
    """What a caller asks for, checked, with the defaults of what is None.

    Args:
        steps, solver, grid: as ``sample``'s.
        name: of the argument ``steps``, for errors.

    Raises:
        TypeError, ValueError: naming the argument; also for "paper" with another solver or grid
            than the paper's.
    """
    counts = split_steps(steps, num_stages, name=name)
    if solver is not None and solver not in SOLVERS:
        raise ValueError(f"argument 'solver': expected one of {SOLVERS}, got {solver!r}")
    placed = None if grid is None else check_grid(grid, counts)
    if not is_paper(steps):
        grid = DEFAULT_GRID if placed is None else placed
        return StepPlan(counts, solver or DEFAULT_SOLVER, grid)
    for what, given, papers in (("solver", solver, PAPER_SOLVER), ("grid", placed, PAPER_GRID)):
        if given not in (None, papers):
            raise ValueError(
                f"argument {what!r}: expected {papers!r} or none with {name}={PAPER!r}, which is "
                f"the paper's whole protocol, got {given!r}; give a number of steps with it"
            )
    return StepPlan(counts, PAPER_SOLVER, PAPER_GRID)


def is_paper(steps: object) -> bool:
    """Whether the steps are the paper's protocol."""
    return isinstance(steps, str) and steps == PAPER


def split_steps(steps: Steps, num_stages: int, *, name: str = "steps") -> list[int]:
    """Steps of each stage.

    Args:
        steps: a number, split so that a stage has ``DEFAULT_RATIO`` times the steps of the one
            before (early stages are cheap and need them most); a list, taken exactly; or
            "paper", the paper's 250, split evenly.
        name: of the argument, for errors.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    expected = f"an integer, a list of them or {PAPER!r}"
    if is_paper(steps):
        return geometric_split(PAPER_STEPS, num_stages, 1.0)
    if isinstance(steps, str):
        raise ValueError(f"argument {name!r}: expected {expected}, got {steps!r}")
    if isinstance(steps, Tensor):
        raise TypeError(f"argument {name!r}: expected {expected}, got a tensor")
    if isinstance(steps, (bool, bytes)) or not isinstance(steps, (int, Sequence)):
        raise TypeError(f"argument {name!r}: expected {expected}, got {steps!r}")
    if isinstance(steps, int):
        if steps < num_stages:
            raise ValueError(
                f"argument {name!r}: expected at least one step for each of {num_stages} stages, "
                f"got {steps}"
            )
        return geometric_split(steps, num_stages, DEFAULT_RATIO)
    if len(steps) != num_stages:
        raise ValueError(
            f"argument {name!r}: expected a list of {num_stages} numbers, one for each stage, got "
            f"{list(steps)}"
        )
    for count in steps:
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"argument {name!r}: expected integers, got {list(steps)}")
        if count < 1:
            raise ValueError(f"argument {name!r}: expected positive numbers, got {list(steps)}")
    return [int(count) for count in steps]


def geometric_split(steps: int, num_stages: int, ratio: float) -> list[int]:
    """``steps`` over stages each of which has ``ratio`` times the steps of the one before: rounded
    by largest remainders (of equal ones, the earlier stage's), and at least one each."""
    weights = [ratio**stage for stage in range(num_stages)]
    shares = [steps * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(num_stages), key=lambda stage: counts[stage] - shares[stage])
    for stage in by_remainder[: steps - sum(counts)]:
        counts[stage] += 1
    for stage in range(num_stages):
        if counts[stage] == 0:
            most = max(range(num_stages), key=lambda other: (counts[other], other))
            counts[most] -= 1
            counts[stage] = 1
    return counts


def _require_finite(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"argument {name!r}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"argument {name!r}: expected a finite number, got {value}")

"""What a run of the sampler is told: guidance and steps, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ecar.sampling.solver import Grid, step_times

__all__ = ["SCHEDULES", "Guidance", "split_steps"]

SCHEDULES = ("constant", "linear")


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


def split_steps(steps: int | Sequence[int], num_stages: int) -> list[int]:
    """Steps of each stage: a number is split as evenly as can be, a list is taken exactly.

    Earlier, cheaper stages get the remainder.
    """
    if isinstance(steps, Tensor):
        raise TypeError("argument 'steps': expected an integer or a list of them, got a tensor")
    if isinstance(steps, bool) or not isinstance(steps, (int, Sequence)) or isinstance(steps, str):
        raise TypeError(f"argument 'steps': expected an integer or a list of them, got {steps!r}")
    if isinstance(steps, int):
        if steps < num_stages:
            raise ValueError(
                f"argument 'steps': expected at least one step for each of {num_stages} stages, "
                f"got {steps}"
            )
        return [steps // num_stages + (s < steps % num_stages) for s in range(num_stages)]
    if len(steps) != num_stages:
        raise ValueError(
            f"argument 'steps': expected a list of {num_stages} numbers, one for each stage, got "
            f"{list(steps)}"
        )
    for count in steps:
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"argument 'steps': expected integers, got {list(steps)}")
        if count < 1:
            raise ValueError(f"argument 'steps': expected positive numbers, got {list(steps)}")
    return list(steps)


def _require_finite(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"argument {name!r}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"argument {name!r}: expected a finite number, got {value}")

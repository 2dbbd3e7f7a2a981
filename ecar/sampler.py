"""Sampling: stage by stage, N_s solver steps each, and the jump between stages (section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecar import stages
from ecar.model import ECAR, check_labels
from ecar.transformer import KVCache
from ecar_kernels import euler_step, initial_noise, upsample_renoise_euler

__all__ = ["Guidance", "SampleOutput", "StepInfo", "sample", "split_steps"]

SOLVERS = ("euler", "heun")
SCHEDULES = ("constant", "linear")


@dataclass(frozen=True)
class StepInfo:
    """What the callback is told after each step.

    ``latents`` [B, C, h, w] is the state after the step, at this stage's resolution. A tensor
    of the same shape, returned by the callback, takes its place, except at a stage's last step
    where the jump to the next stage has been made with it.
    """

    index: int  # steps done before this one, over all stages
    total: int
    stage: int  # counted from 1
    tau: float  # time within the stage at which the step began
    latents: Tensor


@dataclass(frozen=True)
class SampleOutput:
    latents: Tensor  # [B, C, H, W], float32
    stage_ends: list[Tensor] | None  # the end state of every stage, coarse to fine


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


@torch.no_grad()
def sample(
    model: ECAR,
    class_labels: Tensor,
    *,
    seeds: Tensor,
    steps: int | Sequence[int] = 250,
    solver: str = "euler",
    guidance_scale: float = 1.0,
    guidance_schedule: str = "constant",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    callback: Callable[[StepInfo], Tensor | None] | None = None,
    progress: bool = False,
    return_stage_ends: bool = False,
) -> SampleOutput:
    """Draw one latent for each class and seed.

    An image depends on its class, its seed and the settings alone, not on its place in the
    batch, on the batch's size or on the device (to rounding).

    Args:
        model: on any device; its weights' dtype is that of the network calls, the state itself
            is float32.
        class_labels: int64 [B] in [0, num_classes).
        seeds: int64 [B].
        steps: network calls (Euler) of all stages together, or of each stage in a list. Heun
            makes two calls a step.
        solver: "euler" (order 1) or "heun" (order 2).
        guidance_scale, guidance_schedule, guidance_interval: see ``Guidance``.
        callback: called after each step; a returned tensor replaces the state.
        progress: show a progress bar.
        return_stage_ends: keep the end state of every stage.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    config, device = model.config, model.device
    check_labels(class_labels, config.num_classes)
    _check_seeds(seeds, class_labels.shape[0])
    counts = split_steps(steps, config.num_stages)
    if solver not in SOLVERS:
        raise ValueError(f"argument 'solver': expected one of {SOLVERS}, got {solver!r}")
    guidance = Guidance(guidance_scale, guidance_schedule, guidance_interval)
    run = _Run(model, class_labels.to(device), counts, solver, guidance, callback)

    seeds = seeds.to(device)
    x = initial_noise(seeds, config.stage_shape(1), device=device, dtype=torch.float32)
    ends: list[Tensor] = []
    with tqdm(total=sum(counts), disable=not progress, desc="sampling", unit="step") as bar:
        run.bar = bar
        for stage in range(1, config.num_stages + 1):
            end, x = run.stage(stage, x, ends[-1] if ends else None, seeds)
            ends.append(end)
    return SampleOutput(ends[-1], ends if return_stage_ends else None)


class _Run:
    """One call of ``sample``: what stays the same over its stages."""

    def __init__(
        self, model: ECAR, labels: Tensor, counts: list[int], solver: str, guidance: Guidance,
        callback: Callable[[StepInfo], Tensor | None] | None,
    ) -> None:
        self.model, self.counts, self.solver = model, counts, solver
        self.guidance, self.callback = guidance, callback
        self.num_stages, self.batch = model.config.num_stages, labels.shape[0]
        self.scales = [
            [guidance.at(stage, self.num_stages, time) for time in self.times(stage)]
            for stage in range(1, self.num_stages + 1)
        ]
        # Where any step is guided, unconditional rows follow the conditional ones everywhere
        # in the AR: a stage's map needs the cache of all stages before it.
        self.guided = any(scale != 1.0 for scales in self.scales for scale in scales)
        if self.guided:
            labels = torch.cat([labels, torch.full_like(labels, model.config.null_class)])
        self.labels = labels
        self.cache = KVCache(model.config, len(labels), device=model.device, dtype=model.dtype)
        self.bar: tqdm

    def times(self, stage: int) -> list[float]:
        """Global times at which the steps of ``stage`` begin."""
        count = self.counts[stage - 1]
        return [(stage - 1 + step / count) / self.num_stages for step in range(count)]

    def token_map(self, stage: int, end_before: Tensor | None) -> Tensor:
        ar = self.model.ar
        if end_before is None:
            return ar.stage(ar.embed_class(self.labels), self.cache)
        tokens = ar.embed_end(end_before.to(self.model.dtype), stage)
        return ar.stage(tokens.repeat(2, 1, 1) if self.guided else tokens, self.cache)

    def stage(
        self, stage: int, x: Tensor, end_before: Tensor | None, seeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(end_s, start_{s+1}) from start_s = x; the last stage has no start after it."""
        head = self.model.heads[stage - 1]
        count, scales = self.counts[stage - 1], self.scales[stage - 1]
        spatial = head.spatial_parts(self.token_map(stage, end_before))
        conditional = tuple(part[: self.batch] for part in spatial)  # these rows come first
        times = self.times(stage)
        # Heun's second call is at the next step's time; the last one's, at the stage's end.
        grid = torch.tensor([*times, stage / self.num_stages], device=x.device)
        modulations = head.step_parts(grid)
        dt, last = 1 / count, stage == self.num_stages
        before = sum(self.counts[: stage - 1])

        def velocity(state: Tensor, step: int, scale: float) -> Tensor:
            rows, own = state, conditional
            if scale != 1.0:
                rows, own = state.repeat(2, 1, 1, 1), spatial
            v = head.velocity(rows.to(self.model.dtype), own, modulations[step])
            return v.to(state.dtype)

        for step, scale in enumerate(scales):
            v = velocity(x, step, scale)
            if self.solver == "heun":
                ahead = euler_step(x, v, dt, guidance_scale=scale)
                v = (v + velocity(ahead, step + 1, scale)) / 2
            if step < count - 1 or last:
                x = euler_step(x, v, dt, guidance_scale=scale)
                end = x
            else:
                end, x = upsample_renoise_euler(
                    x, v, dt, time=stages.start_time(stage + 1, self.num_stages), stage=stage + 1,
                    seeds=seeds, guidance_scale=scale,
                )
            self.bar.update()
            if self.callback is not None:
                info = StepInfo(before + step, sum(self.counts), stage, step * dt, end)
                replaced = self.callback(info)
                if replaced is not None and replaced is not end:
                    x = end = _checked_state(replaced, end, step == count - 1 and not last)
        return end, x


def _checked_state(replaced: object, state: Tensor, jumped: bool) -> Tensor:
    if jumped:
        raise ValueError(
            "callback: a state returned at the last step of a stage comes too late, the jump to "
            "the next stage has been made"
        )
    if not isinstance(replaced, Tensor) or replaced.shape != state.shape:
        came = list(replaced.shape) if isinstance(replaced, Tensor) else type(replaced).__name__
        raise ValueError(
            f"callback: expected None or a tensor of shape {list(state.shape)}, got {came}"
        )
    return replaced.to(state)


def _check_seeds(seeds: object, batch: int) -> None:
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
        came = seeds.dtype if isinstance(seeds, Tensor) else type(seeds).__name__
        raise TypeError(f"argument 'seeds': expected an int64 tensor, got {came}")
    if tuple(seeds.shape) != (batch,):
        raise ValueError(
            f"argument 'seeds': expected shape [{batch}], one for each class label, got "
            f"{list(seeds.shape)}"
        )


def _require_finite(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"argument {name!r}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"argument {name!r}: expected a finite number, got {value}")

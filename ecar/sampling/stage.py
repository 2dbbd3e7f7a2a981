"""What a run is told, in buffers allocated once, and what one stage of it needs.

A run is made for a ``Shape``. What differs between images of the same shape (classes, seeds,
guidance scales, where the steps lie) is data in ``Inputs``, so that a CUDA graph of a run serves
them all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ecar import stages
from ecar.flow import FlowHead
from ecar.model import ECAR
from ecar.sampling.solver import Grid, Solver, Step, place_steps, solver_class
from ecar.transformer import KVCache
from ecar_kernels import initial_noise

__all__ = ["Inputs", "Shape", "Stage"]


@dataclass(frozen=True)
class Shape:
    """What a run is made for, apart from the model."""

    batch: int
    counts: tuple[int, ...]  # steps of each stage
    solver: str
    guided: tuple[tuple[bool, ...], ...]  # each stage's steps: are there unconditional rows?


@dataclass
class Stage:
    """One stage of a run: what stays the same over its steps.

    Shapes: B images; R = B rows of the network, or 2 B where a step is guided, conditional first.
    """

    number: int  # counted from 1
    head: FlowHead
    solver: Solver
    token_map: Tensor  # M_s [R, N, width], R that of the stage's widest step
    times: Tensor  # global times of the solver's velocities
    guided: tuple[bool, ...]  # of each step
    scales: Sequence[float | Tensor]  # of each step
    input: Tensor  # [R, C, h, w], the network's dtype: room for what it sees of the state
    seeds: Tensor  # int64 [B]
    next_time: float | None  # a_{s+1}; None at the last stage

    @functools.cached_property
    def spatial(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The modulation's part of the tokens, by whether the step is guided."""
        both, batch = self.head.spatial_parts(self.token_map), len(self.seeds)
        return tuple(part[:batch] for part in both), both

    @functools.cached_property
    def modulation(self) -> list[tuple[Tensor, ...]]:
        """Its part of the time, for each of ``times``."""
        return self.head.step_parts(self.times)

    @property
    def last(self) -> int:
        """The last step."""
        return len(self.guided) - 1

    def rows(self, step: int) -> int:
        return (1 + self.guided[step]) * len(self.seeds)

    def scale(self, step: int) -> float | Tensor:
        return self.scales[step] if self.guided[step] else 1.0

    def network_input(self, x: Tensor, step: int) -> Tensor:
        """The state in the network's dtype, twice where the step is guided."""
        if not self.guided[step] and x.dtype == self.input.dtype:
            return x
        rows = self.input[: self.rows(step)]
        rows.view(1 + self.guided[step], *x.shape).copy_(x)
        return rows

    def velocity(self, x: Tensor, step: int, at: int) -> Tensor:
        """The velocity [R, C, h, w] of a state of ``step``, at the time number ``at``."""
        rows = self.network_input(x, step)
        if self.head.callable_only():
            time = self.times[at].expand(len(rows))
            return self.head(rows, time, self.token_map[: len(rows)]).to(x.dtype)
        spatial = self.spatial[self.guided[step]]
        return self.head.velocity(rows, spatial, self.modulation[at]).to(x.dtype)

    def slope(self, x: Tensor, step: int) -> tuple[Tensor, float | Tensor]:
        """The solver's, of the state x before ``step``, and the guidance's scale."""
        return self.solver.slope(self.velocity, x, step, self.scale(step))


class Inputs:
    """Classes, seeds, guidance scales and steps of a run, and the buffers that its stages share.

    The model is given to ``stage`` and not kept, so that a model's graphs do not keep it alive.

    Args:
        model: for its configuration, device and dtype.
        shape: of the run.
        device_data: guidance scales and the steps' lengths and ratios are device data, as a CUDA
            graph needs them, and not numbers, which cost the CPU less.
    """

    def __init__(self, model: ECAR, shape: Shape, *, device_data: bool) -> None:
        config, device, dtype = model.config, model.device, model.dtype
        self.config, self.shape, self.dtype = config, shape, dtype
        batch, counts = shape.batch, shape.counts
        # Where a step is guided, unconditional rows follow the conditional ones in the AR: of its
        # stage, and of all before it, whose cache its map needs.
        last = max((s for s, steps in enumerate(shape.guided, start=1) if any(steps)), default=0)
        self.stage_rows = [
            2 * batch if stage <= last else batch for stage in range(1, len(counts) + 1)
        ]
        self.rows = self.stage_rows[0]
        self.labels = torch.full((self.rows,), config.null_class, device=device)
        self.seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        self.scales: list[list[float | Tensor]] = [[1.0] * count for count in counts]
        self.steps = self._placed(1.0)
        # Every stage's times, then the scales, lengths and ratios of the steps: one copy loads all.
        times = [len(its) for its in self._times(self.steps)]
        numbers = 3 * sum(counts) if device_data else 0
        self._data = torch.zeros(sum(times) + numbers, dtype=torch.float32, device=device)
        self.times = self._data[: sum(times)].split(times)
        self._device_data = device_data
        if device_data:
            views = iter(self._data[sum(times) :].unbind())

            def each_step() -> list[list[float | Tensor]]:
                return [list(itertools.islice(views, count)) for count in counts]

            self.scales, lengths, ratios = each_step(), each_step(), each_step()
            # Where they begin is known to the times alone.
            self.steps = [
                tuple(Step(math.nan, *pair) for pair in zip(*its, strict=True))
                for its in zip(lengths, ratios, strict=True)
            ]
        self.inputs = [
            torch.empty(self.rows, *config.stage_shape(stage), device=device, dtype=dtype)
            for stage in range(1, config.num_stages + 1)
        ]
        self.cache = KVCache(config, self.rows, device=device, dtype=dtype)

    def _placed(self, grid: Grid) -> list[tuple[Step, ...]]:
        counts = self.shape.counts
        return [place_steps(counts, stage, grid) for stage in range(1, len(counts) + 1)]

    def _times(self, placed: Sequence[Sequence[Step]]) -> list[list[float]]:
        """Global times of the velocities of each stage's solver."""
        solver, count = solver_class(self.shape.solver), self.config.num_stages
        return [
            [stages.global_time(stage, count, tau) for tau in solver(steps).taus()]
            for stage, steps in enumerate(placed, start=1)
        ]

    def load(
        self, labels: Tensor, seeds: Tensor, scales: Sequence[Sequence[float]], grid: Grid
    ) -> None:
        """Set the classes [B], the seeds [B], every step's guidance scale, and where steps lie."""
        self.labels[: self.shape.batch].copy_(labels, non_blocking=True)
        self.seeds.copy_(seeds, non_blocking=True)
        placed = self._placed(grid)
        numbers: list[Sequence[float | Tensor]] = [*self._times(placed)]
        if self._device_data:
            numbers += scales
            numbers += [[step.dt for step in steps] for steps in placed]
            numbers += [[step.ratio for step in steps] for steps in placed]
        else:
            self.scales, self.steps = [list(values) for values in scales], placed
        flat = torch.tensor(list(itertools.chain(*numbers)), dtype=torch.float32, device="cpu")
        self._data.copy_(flat, non_blocking=True)

    def noise(self) -> Tensor:
        """The state that the first stage starts from: n_1 [B, C, h, w], float32."""
        shape = self.config.stage_shape(1)
        return initial_noise(self.seeds, shape, device=self.seeds.device, dtype=torch.float32)

    def stage(self, model: ECAR, number: int, end_before: Tensor | None) -> Stage:
        """A stage, its token map computed. The stages of an image come in their order.

        Args:
            model: that which ``Inputs`` was made for.
            number: counted from 1.
            end_before: the end state [B, C, h, w] of the stage before; None for the first.
        """
        guided, batch = self.shape.guided[number - 1], self.shape.batch
        token_map = self._token_map(model, number, end_before)
        following = number + 1
        return Stage(
            number,
            cast("FlowHead", model.heads[number - 1]),
            solver_class(self.shape.solver)(self.steps[number - 1]),
            token_map[: 2 * batch if any(guided) else batch],
            self.times[number - 1],
            guided,
            self.scales[number - 1],
            self.inputs[number - 1],
            self.seeds,
            stages.start_time(following, self.config.num_stages)
            if following <= self.config.num_stages
            else None,
        )

    def _token_map(self, model: ECAR, number: int, end_before: Tensor | None) -> Tensor:
        ar, rows = model.ar, self.stage_rows[number - 1]
        if end_before is None:
            self.cache.stages = 0
            return ar.stage(ar.embed_class(self.labels), self.cache)
        tokens = ar.embed_end(end_before, number)
        if rows > self.shape.batch:
            tokens = tokens.repeat(2, 1, 1)
        return ar.stage(ar.with_class(tokens, self.labels[:rows]), self.cache)

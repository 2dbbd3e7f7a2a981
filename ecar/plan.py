"""A run of the sampler as a plan: buffers first, then nothing but ops on them.

A plan is made for a batch, the steps of each stage, a solver and a pattern of guided steps. What
differs between images of the same plan (classes, seeds, guidance scales) is data in its buffers,
so that a CUDA graph of ``run`` serves them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import ecar_kernels
from ecar import bound, stages
from ecar.flow import NORM_EPS, FlowHead
from ecar.guidance import step_times
from ecar.model import ECAR
from ecar.transformer import KVCache, patchify, unpatchify
from ecar_kernels import initial_noise, registry

__all__ = ["Plan", "Shape"]

# Called after each step with (stage from 1, step in the stage, what gives the state as an image)
# -> a state in its place or None.
Watch = Callable[[int, int, Callable[[], Tensor]], "Tensor | None"]


@dataclass(frozen=True)
class Shape:
    """What a plan is made for, beside the model."""

    batch: int
    counts: tuple[int, ...]  # steps of each stage
    solver: str
    guided: tuple[tuple[bool, ...], ...]  # each stage's steps: are there unconditional rows?


class Plan:
    """Buffers of a run, allocated here once, and the run itself.

    The model is given to ``run`` and not kept, so that a model's plans do not keep it alive.

    Args:
        model: for its configuration, device and dtype.
        shape: what the plan is made for.
        device_scales: guidance scales are device data, as a CUDA graph needs them, and not
            numbers, which cost the CPU less.
    """

    def __init__(self, model: ECAR, shape: Shape, *, device_scales: bool) -> None:
        config, device, dtype = model.config, model.device, model.dtype
        self.config, self.shape, self.dtype = config, shape, dtype
        batch, self.counts = shape.batch, shape.counts
        # Where any step is guided, unconditional rows follow the conditional ones everywhere
        # in the AR: a stage's map needs the cache of all stages before it.
        self.rows = 2 * batch if any(map(any, shape.guided)) else batch
        self.labels = torch.full((self.rows,), config.null_class, device=device)
        self.seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        self.scale_data = torch.ones(sum(self.counts), device=device) if device_scales else None
        self.scales: list[list[float | Tensor]] = [[1.0] * count for count in self.counts]
        if self.scale_data is not None:
            views = iter(self.scale_data.unbind())
            self.scales = [[next(views) for _ in range(count)] for count in self.counts]
        self.times = [
            torch.tensor(self._network_times(stage), dtype=torch.float32, device=device)
            for stage in range(1, config.num_stages + 1)
        ]
        # What the network sees of the state: in its dtype, and twice where guided.
        self.inputs = [
            torch.empty(self.rows, *config.stage_shape(stage), device=device, dtype=dtype)
            for stage in range(1, config.num_stages + 1)
        ]
        self.cache = KVCache(config, self.rows, device=device, dtype=dtype)
        self.served: dict[str, str] = {}  # by the last run: see SampleOutput
        # Heun's two velocities of a step need the state as an image anyway.
        token_layout = shape.solver == "euler"
        self.boundary = boundary_op(device, dtype, config.width) if token_layout else None
        # On the CPU the steps are bound ahead of time (bound.py), each op to a buffer.
        self.buffers: bound.Buffers | None = None
        if (
            device.type == "cpu"
            and self.boundary is not None
            and not device_scales
            and all(bound.can_bind(head, dtype) for head in model.heads)
        ):
            self.buffers = bound.Buffers(config, batch, self.rows, dtype)

    def _network_times(self, stage: int) -> list[float]:
        times = step_times(self.counts, stage)
        # Heun's second call is at the next step's time; the last one's, at the stage's end.
        return times if self.shape.solver == "euler" else [*times, stage / self.config.num_stages]

    def load(self, labels: Tensor, seeds: Tensor, scales: Sequence[Sequence[float]]) -> None:
        """Set the classes [B], the seeds [B] and every step's guidance scale."""
        self.labels[: self.shape.batch].copy_(labels, non_blocking=True)
        self.seeds.copy_(seeds, non_blocking=True)
        if self.scale_data is None:
            self.scales = [list(values) for values in scales]
        else:
            flat = [scale for values in scales for scale in values]
            self.scale_data.copy_(torch.tensor(flat), non_blocking=True)

    def run(self, model: ECAR, watch: Watch | None = None) -> list[Tensor]:
        """The end state of every stage [B, C, h, w], float32."""
        with registry.record() as log:
            ends = self._run(model, watch)
        self.served = {op: ", ".join(sorted(names)) for op, names in sorted(log.items())}
        return ends

    def _run(self, model: ECAR, watch: Watch | None) -> list[Tensor]:
        config = self.config
        self.cache.stages = 0
        x = initial_noise(
            self.seeds, config.stage_shape(1), device=self.seeds.device, dtype=torch.float32
        )
        ends: list[Tensor] = []
        for stage in range(1, config.num_stages + 1):
            end, x = self._stage(model, stage, x, ends[-1] if ends else None, watch)
            ends.append(end)
        return ends

    def _token_map(self, model: ECAR, stage: int, end_before: Tensor | None) -> Tensor:
        ar = model.ar
        if end_before is None:
            return ar.stage(ar.embed_class(self.labels), self.cache)
        tokens = ar.embed_end(end_before.to(self.dtype), stage)
        if self.rows > self.shape.batch:
            tokens = tokens.repeat(2, 1, 1)
        return ar.stage(tokens, self.cache)

    def _stage(
        self, model: ECAR, stage: int, x: Tensor, end_before: Tensor | None, watch: Watch | None
    ) -> tuple[Tensor, Tensor]:
        """(end_s, start_{s+1}) from start_s = x; the last stage has no start after it."""
        token_map = self._token_map(model, stage, end_before)
        run = Stage(self, model.heads[stage - 1], stage, token_map, watch)
        if self.buffers is not None:
            return bound.run_stage(run, self.buffers, x)
        if self.boundary is None or not run.head.fuses_boundary():
            x = run.image_steps(x)
        else:
            x = run.token_steps(x, self.boundary)
        return run.last_step(x)


class Stage:
    """One stage of a run: what stays the same over its steps."""

    def __init__(
        self, plan: Plan, head: FlowHead, stage: int, token_map: Tensor, watch: Watch | None
    ) -> None:
        self.plan, self.head, self.stage, self.watch = plan, head, stage, watch
        self.batch, self.count = plan.shape.batch, plan.counts[stage - 1]
        self.guided, self.scales = plan.shape.guided[stage - 1], plan.scales[stage - 1]
        self.dt, self.input = 1 / self.count, plan.inputs[stage - 1]
        self.token_map = token_map[: 2 * self.batch if any(self.guided) else self.batch]

    @functools.cached_property
    def spatial(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """By whether the step is guided: the first B rows are the conditional ones."""
        both = self.head.spatial_parts(self.token_map)
        return tuple(part[: self.batch] for part in both), both

    @functools.cached_property
    def steps(self) -> list[tuple[Tensor, ...]]:
        return self.head.step_parts(self.plan.times[self.stage - 1])

    def rows(self, step: int) -> int:
        return 2 * self.batch if self.guided[step] else self.batch

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
        """The velocity of a state of ``step``, at the time of step ``at``."""
        rows = self.network_input(x, step)
        if self.head.callable_only():
            time = self.plan.times[self.stage - 1][at].expand(len(rows))
            return self.head(rows, time, self.token_map[: len(rows)]).to(x.dtype)
        spatial = self.spatial[self.guided[step]]
        return self.head.velocity(rows, spatial, self.steps[at]).to(x.dtype)

    def slope(self, x: Tensor, step: int) -> Tensor:
        """What x + dt v takes for v."""
        v = self.velocity(x, step, step)
        if self.plan.shape.solver == "heun":
            ahead = euler(x, v, self.dt, self.scale(step))
            v = (v + self.velocity(ahead, step, step + 1)) / 2
        return v

    def image_steps(self, x: Tensor) -> Tensor:
        """All steps but the last."""
        for step in range(self.count - 1):
            x = self.step(x, step)
        return x

    def step(self, x: Tensor, step: int) -> Tensor:
        return self.seen(euler(x, self.slope(x, step), self.dt, self.scale(step)), step)

    def last_step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The end, and the start of the next stage; at the last stage, the end twice."""
        step, num_stages = self.count - 1, self.plan.config.num_stages
        if self.stage == num_stages:
            end = self.step(x, step)
            return end, end
        end, start = jump(
            x,
            self.slope(x, step),
            self.dt,
            self.scale(step),
            stage=self.stage + 1,
            time=stages.start_time(self.stage + 1, num_stages),
            seeds=self.plan.seeds,
        )
        self.seen(end, step)
        return end, start

    def seen(self, x: Tensor, step: int) -> Tensor:
        replaced = None if self.watch is None else self.watch(self.stage, step, lambda: x)
        return x if replaced is None else replaced

    def token_steps(self, x: Tensor, flow_boundary: Callable) -> Tensor:
        """All Euler steps but the last, with the state in the token layout between them."""
        if self.count == 1:
            return x
        head, patch = self.head, self.head.patch_size
        state = patchify(x, patch)
        embedded = head.embed_tokens(self.network_input(x, 0))
        for step in range(self.count - 1):
            rows = self.rows(step)
            if len(embedded) < rows:
                embedded = embedded.repeat(2, 1, 1)
            spatial, own = self.spatial[self.guided[step]], self.steps[step]
            stream = head.stream(embedded[:rows], spatial, own)
            state, embedded = flow_boundary(
                stream,
                state,
                spatial[-2],
                spatial[-1],
                head.output.weight,
                head.output.bias,
                head.embed.weight,
                head.embed.bias,
                head.positions,
                self.dt,
                step_shift=own[-2],
                step_scale=own[-1],
                guidance_scale=self.scale(step),
                eps=NORM_EPS,
            )
            if self.watch is not None:
                image = functools.partial(unpatchify, state, patch, head.shape)
                if (replaced := self.watch(self.stage, step, image)) is not None:
                    state = patchify(replaced, patch)
                    embedded = head.embed_tokens(self.network_input(replaced, step))
        return unpatchify(state, patch, head.shape)


def boundary_op(device: torch.device | str, dtype: torch.dtype, width: int) -> Callable | None:
    """flow_boundary where a kernel serves it on this device: composed, it would only cost."""
    settings = {"device": device, "dtype": dtype, "width": width}
    try:
        chosen = registry.resolve("flow_boundary", **settings)
    except registry.BackendUnavailableError:
        return None
    plain = registry.resolve("flow_boundary", **settings, backend="reference")
    return None if chosen is plain else ecar_kernels.flow_boundary


def euler(x: Tensor, velocity: Tensor, dt: float, scale: float | Tensor) -> Tensor:
    velocity, scale = _guide(velocity, scale)
    return ecar_kernels.euler_step(x, velocity, dt, guidance_scale=scale)


def jump(
    x: Tensor, velocity: Tensor, dt: float, scale: float | Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    velocity, scale = _guide(velocity, scale)
    return ecar_kernels.upsample_renoise_euler(x, velocity, dt, guidance_scale=scale, **options)


def _guide(velocity: Tensor, scale: float | Tensor) -> tuple[Tensor, float | Tensor]:
    """The guidance itself where the scale is data on the CPU, where the ops take it as a number.

    A run that was recorded would keep that number.
    """
    if velocity.is_cuda or not isinstance(scale, Tensor):
        return velocity, scale
    conditional, unconditional = velocity.chunk(2)
    return torch.lerp(unconditional, conditional, scale), 1.0

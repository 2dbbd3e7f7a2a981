"""The plain engine: op after op from Python, on any device and by any backend.

Between the steps the state is an image or, where ``flow_boundary`` serves, tokens [B, N, C p p]:
then a step ends in one op, which also embeds the next step's tokens. A stage's end is an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ecar_kernels
from ecar.flow import NORM_EPS
from ecar.model import ECAR
from ecar.sampling.stage import Inputs, Stage
from ecar.transformer import patchify, unpatchify
from ecar_kernels import registry
from ecar_kernels.inspection import in_transform

__all__ = ["PlainEngine", "boundary_op"]


class PlainEngine:
    """An ``Engine`` (loop.py) of one run.

    Args:
        model: the model.
        inputs: loaded.
    """

    _stage: Stage
    _boundary: Callable | None  # the stage's; None: all of its steps are in the image layout
    _state: Tensor
    _embedded: Tensor | None  # the next step's tokens; None: the state is an image
    _statistics: Tensor | None  # which flow_boundary left together with those
    _end: Tensor | None = None
    _start: Tensor  # of the stage that comes next

    def __init__(self, model: ECAR, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.boundary = boundary_op(model.device, model.dtype, model.config.width)

    def begin(self, stage: int) -> None:
        x = self.inputs.noise() if stage == 1 else self._start
        self._stage = run = self.inputs.stage(self.model, stage, self._end)
        fuses = run.solver.fused and run.head.fuses_boundary()
        self._boundary = self.boundary if fuses else None
        self.replace(x, 0)

    def replace(self, x: Tensor, step: int) -> None:
        run, head = self._stage, self._stage.head
        self._state, self._embedded, self._statistics = x, None, None
        run.solver.restart()
        if self._boundary is not None and step <= run.last:
            self._state = patchify(x, head.patch_size)
            self._embedded = head.embed_tokens(run.network_input(x, step))

    def step(self, step: int) -> int:
        if self._boundary is not None and self._embedded is not None:
            self._token_step(step, self._boundary, self._embedded)
        else:
            self._image_step(step)
        return 1

    def _image_step(self, step: int) -> None:
        run, x = self._stage, self.image()
        slope, scale = run.slope(x, step)
        if step == run.last and run.next_time is not None:
            self._state, self._start = run.solver.jump(
                x, slope, step, scale, time=run.next_time, stage=run.number + 1, seeds=run.seeds
            )
        else:
            self._state = run.solver.advance(x, slope, step, scale)

    def _token_step(self, step: int, flow_boundary: Callable, embedded: Tensor) -> None:
        run, head, rows = self._stage, self._stage.head, self._stage.rows(step)
        statistics = self._statistics
        if len(embedded) < rows:
            embedded = embedded.repeat(2, 1, 1)
            statistics = statistics if statistics is None else statistics.repeat(2, 1, 1, 1)
        elif statistics is not None:
            statistics = statistics[:rows]
        spatial, own = run.spatial[run.guided[step]], run.modulation[step]
        self._state, self._embedded, self._statistics = run.solver.boundary(
            flow_boundary,
            step,
            head.stream(embedded[:rows], spatial, own, statistics),
            self._state,
            spatial[-2],
            spatial[-1],
            head.output.weight,
            head.output.bias,
            head.embed.weight,
            head.embed.bias,
            head.positions,
            step_shift=own[-2],
            step_scale=own[-1],
            guidance_scale=run.scale(step),
            eps=NORM_EPS,
        )
        if step < run.last:
            return
        self._state, self._embedded, self._statistics = self.image(), None, None
        if run.next_time is not None:
            # A step of no length: the step itself is done.
            self._state, self._start = ecar_kernels.upsample_renoise_euler(
                self._state,
                self._state,
                0.0,
                time=run.next_time,
                stage=run.number + 1,
                seeds=run.seeds,
            )

    def image(self) -> Tensor:
        if self._embedded is None:
            return self._state
        head = self._stage.head
        return unpatchify(self._state, head.patch_size, head.shape)

    def finish(self) -> Tensor:
        end = self._end = self._state
        del self._stage  # and its modulations, before the next stage's are made
        return end


def boundary_op(device: torch.device | str, dtype: torch.dtype, width: int) -> Callable | None:
    """flow_boundary where a kernel serves it on this device: composed, it would only cost. The form
    that leaves statistics for the first block, where there is one and nothing has to be cast."""
    try:
        chosen = registry.resolve("flow_boundary", device=device, dtype=dtype, width=width)
    except registry.BackendUnavailableError:
        return None
    chained = chosen.chained
    if chained is None or torch.is_autocast_enabled(torch.device(device).type) or in_transform():
        return None if chosen.backend == "reference" else ecar_kernels.flow_boundary

    def flow_boundary(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        registry.note("flow_boundary", chosen.backend)
        return chained(*arguments, **options)

    return flow_boundary

"""The plain engine: op after op from Python, on any device and by any backend.

Between the steps the state is an image or, where ``flow_boundary`` serves, tokens [B, N, C p p]:
then a step ends in one op, which also embeds the next step's tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import ecar_kernels
from ecar.flow import NORM_EPS
from ecar.model import ECAR
from ecar.sampling.stage import Inputs, Stage
from ecar.transformer import patchify, unpatchify
from ecar_kernels import registry

__all__ = ["PlainEngine", "boundary_op"]


class PlainEngine:
    """An ``Engine`` (loop.py) of one run.

    Args:
        model: the model.
        inputs: loaded.
    """

    _stage: Stage
    _fuses: bool  # the stage's steps but the last are in the token layout
    _x: Tensor | None  # the state as an image
    _tokens: tuple[Tensor, Tensor] | None  # or in tokens, with the next step's embedded ones
    _end: Tensor | None = None
    _start: Tensor  # of the stage that comes next

    def __init__(self, model: ECAR, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.boundary = boundary_op(model.device, model.dtype, model.config.width)

    def begin(self, stage: int) -> None:
        x = self.inputs.noise() if stage == 1 else self._start
        self._stage = run = self.inputs.stage(self.model, stage, self._end)
        self._fuses = self.boundary is not None and run.solver.fused and run.head.fuses_boundary()
        self.replace(x, 0)

    def replace(self, x: Tensor, step: int) -> None:
        run, head = self._stage, self._stage.head
        if self._fuses and step < run.last:
            embedded = head.embed_tokens(run.network_input(x, step))
            self._x, self._tokens = None, (patchify(x, head.patch_size), embedded)
        else:
            self._x, self._tokens = x, None

    def step(self, step: int) -> int:
        if step < self._stage.last and self._tokens is not None:
            self._tokens = self._token_step(step, *self._tokens)
        else:
            self._image_step(step)
        return 1

    def _image_step(self, step: int) -> None:
        run, x = self._stage, self.image()
        self._tokens = None
        slope, scale = run.slope(x, step), run.scale(step)
        if step == run.last and run.next_time is not None:
            self._x, self._start = run.solver.jump(
                x, slope, step, scale, time=run.next_time, stage=run.number + 1, seeds=run.seeds
            )
        else:
            self._x = run.solver.advance(x, slope, step, scale)

    def _token_step(self, step: int, state: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        run, head, rows = self._stage, self._stage.head, self._stage.rows(step)
        if len(embedded) < rows:
            embedded = embedded.repeat(2, 1, 1)
        spatial, own = run.spatial[run.guided[step]], run.modulation[step]
        return run.solver.boundary(
            self.boundary,
            step,
            head.stream(embedded[:rows], spatial, own),
            state,
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

    def image(self) -> Tensor:
        if self._tokens is None:
            return self._x
        head = self._stage.head
        return unpatchify(self._tokens[0], head.patch_size, head.shape)

    def finish(self) -> Tensor:
        self._end, self._x = self._x, None
        del self._stage  # and its modulations, before the next stage's are made
        return self._end


def boundary_op(device: torch.device | str, dtype: torch.dtype, width: int) -> Callable | None:
    """flow_boundary where a kernel serves it on this device: composed, it would only cost."""
    settings = {"device": device, "dtype": dtype, "width": width}
    try:
        chosen = registry.resolve("flow_boundary", **settings)
    except registry.BackendUnavailableError:
        return None
    plain = registry.resolve("flow_boundary", **settings, backend="reference")
    return None if chosen is plain else ecar_kernels.flow_boundary

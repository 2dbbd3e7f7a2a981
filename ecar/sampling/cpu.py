"""The CPU's engine: a stage's steps as C++ calls, laid out before the first of them.

The calls are ``ecar_kernels.BoundFlowStep``'s. The state is tokens [B, N, C p p] between the
steps; only a stage's end is an image.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ecar.flow import NORM_EPS, FlowHead
from ecar.model import ECAR
from ecar.sampling.solver import Solver, solver_class
from ecar.sampling.stage import Inputs, Stage
from ecar.transformer import embedded
from ecar_kernels import BoundFlowStep

__all__ = ["CpuEngine"]


class CpuEngine:
    """An ``Engine`` (loop.py) of one run; where ``serves`` says so.

    Args:
        model: the model.
        inputs: loaded, with scales and steps that are numbers.
    """

    _stage: Stage
    _restart: bool  # the next step has no history

    def __init__(self, model: ECAR, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        config, batch = inputs.config, inputs.shape.batch
        self.bound = BoundFlowStep(
            batch=batch,
            rows=inputs.rows,
            tokens=max(config.stage_tokens),
            width=config.width,
            hidden=config.mlp_width,
            values=config.channels * config.patch_size**2,
            dtype=inputs.dtype,
            history=solver_class(inputs.shape.solver).history,
        )
        self._ends = [
            torch.empty(batch, *config.stage_shape(stage), dtype=torch.float32, device="cpu")
            for stage in range(1, config.num_stages + 1)
        ]
        # Where each stage but the first starts: written by the jump to it.
        self._starts = [torch.empty_like(end) for end in self._ends[1:]]

    @staticmethod
    def serves(model: ECAR, solver: type[Solver]) -> bool:
        """Is the model on the CPU, every op of its steps served by C++, every layer as written?"""
        return (
            model.device.type == "cpu"
            and solver.fused
            and all(_bindable(cast("FlowHead", head), model.dtype) for head in model.heads)
        )

    def begin(self, stage: int) -> None:
        before = None if stage == 1 else self._ends[stage - 2]
        x = self.inputs.noise() if stage == 1 else self._starts[stage - 2]
        self._stage = run = self.inputs.stage(self.model, stage, before)
        self._end, head = self._ends[stage - 1], run.head
        spatial = head.spatial_modulation(run.token_map)
        self.bound.bind(head.blocks, head.output, head.embed, head.positions, spatial, eps=NORM_EPS)
        times = head.step_modulation(run.times).split(1)
        for step, (time, placed) in enumerate(zip(times, run.solver.steps, strict=True)):
            self.bound.add(
                time,
                rows=run.rows(step),
                dt=float(placed.dt),
                ratio=float(run.solver.ratio(step)),
                guidance_scale=float(run.scale(step)),
            )
        self._end_patches = _patches(self._end, head.patch_size)
        self._state_patches = self.bound.state.view(self._end_patches.shape)
        self.replace(x, 0)

    def replace(self, x: Tensor, step: int) -> None:
        run, self._restart = self._stage, True
        if step > run.last:
            self._end.copy_(x)
            return
        self._state_patches.copy_(_patches(x, run.head.patch_size))
        head, stream = run.head, self.bound.stream[: run.rows(step)]
        # As the boundary does, of the state in float32.
        tokens = embedded(head.embed, self.bound.state, head.positions)
        stream.view(1 + run.guided[step], *tokens.shape).copy_(tokens)

    def step(self, step: int) -> int:
        self.bound.run(step, restart=self._restart)
        run, self._restart = self._stage, False
        if step == run.last:
            self._end_patches.copy_(self._state_patches)
            if run.next_time is not None:
                self.bound.jump(
                    self._end,
                    self._starts[run.number - 1],
                    time=run.next_time,
                    stage=run.number + 1,
                    seeds=run.seeds,
                )
        return 1

    def image(self) -> Tensor:
        image = torch.empty_like(self._end)  # the state is written over by the next step
        _patches(image, self._stage.head.patch_size).copy_(self._state_patches)
        return image

    def finish(self) -> Tensor:
        del self._stage
        return self._end


def _bindable(head: FlowHead, dtype: torch.dtype) -> bool:
    return head.fuses_steps() and (
        BoundFlowStep.why_not(head.blocks, head.output, head.embed, head.positions, dtype) is None
    )


def _patches(x: Tensor, patch: int) -> Tensor:
    """``patchify``'s values as a view: [B, C, h, w] -> [B, h/p, w/p, C, p, p]."""
    split = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return split.permute(0, 2, 4, 1, 3, 5)

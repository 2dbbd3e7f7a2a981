"""The sampling loop: stage by stage and step by step over an engine, and the callback's protocol.

The engines are ``plain.PlainEngine`` (op after op), ``cpu.CpuEngine`` (C++ calls bound ahead of
the first step) and ``graph.GraphEngine`` (one replay of a CUDA graph).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ecar.sampling.solver import Grid, place_steps
from ecar_kernels import registry

__all__ = ["Engine", "StepInfo", "run", "served_by"]


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


class Engine(Protocol):
    """How the steps of a run are computed. Stages and steps come in their order."""

    def begin(self, stage: int) -> None:
        """Prepare the stage: what it computes once, before its first step."""

    def step(self, step: int) -> int:
        """Take the step, or several of the stage's from it on at once; return how many."""

    def image(self) -> Tensor:
        """Return the state [B, C, h, w], a tensor that no later step writes to."""

    def replace(self, x: Tensor, step: int) -> None:
        """Continue from the state x [B, C, h, w] before ``step``; behind the last step x is the
        stage's end."""

    def finish(self) -> Tensor:
        """Return the stage's end state [B, C, h, w], float32."""


def run(
    engine: Engine,
    counts: Sequence[int],
    *,
    grid: Grid = 1.0,
    progress: Callable[[int], object] | None = None,
    callback: Callable[[StepInfo], Tensor | None] | None = None,
) -> list[Tensor]:
    """The end state of every stage [B, C, h, w], float32.

    Args:
        engine: made for stages of ``counts`` steps.
        counts: steps of each stage.
        grid: where they lie, as the engine has them.
        progress: called with the number of steps taken since the last call.
        callback: as ``sample``'s, for an engine that takes one step at a time.
    """
    ends: list[Tensor] = []
    for stage, count in enumerate(counts, start=1):
        engine.begin(stage)
        step, placed, before = 0, place_steps(counts, stage, grid), sum(counts[: stage - 1])
        while step < count:
            taken = engine.step(step)
            step += taken
            if progress is not None:
                progress(taken)
            if callback is not None:
                index, tau = before + step - 1, placed[step - 1].tau
                info = StepInfo(index, sum(counts), stage, tau, engine.image())
                replaced = _replaced(callback, info)
                if replaced is not None and step == count and stage < len(counts):
                    raise ValueError(
                        "callback: a state returned at the last step of a stage comes too late, "
                        "the jump to the next stage has been made"
                    )
                if replaced is not None:
                    engine.replace(replaced, step)
        ends.append(engine.finish())
    return ends


def _replaced(callback: Callable[[StepInfo], Tensor | None], info: StepInfo) -> Tensor | None:
    """The state that takes the place of ``info.latents``: returned, or edited in place."""
    state, shown = info.latents, info.latents.clone()
    returned = callback(info)
    if returned is None or returned is state:
        return None if _same_bits(state, shown) else state
    if not isinstance(returned, Tensor) or returned.shape != state.shape:
        came = list(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
        raise ValueError(
            f"callback: expected None or a tensor of shape {list(state.shape)}, got {came}"
        )
    return returned.to(state)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    """Of float32 tensors. NaN is the same as NaN: an untouched state need not be finite."""
    return torch.equal(x.view(torch.int32), y.view(torch.int32))


@contextlib.contextmanager
def served_by() -> Iterator[dict[str, str]]:
    """Yields a dictionary that is filled at the block's end: each op called, and what served it
    (see ``SampleOutput.served``)."""
    served: dict[str, str] = {}
    with registry.record() as log:
        yield served
    served.update({op: ", ".join(sorted(names)) for op, names in sorted(log.items())})

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

from ecar.sampling.solver import place_steps
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
        """What a stage does once, before its first step."""

    def step(self, step: int) -> int:
        """Takes the step, and as many after it in the stage as it takes at once: how many."""

    def image(self) -> Tensor:
        """The state [B, C, h, w], which no later step writes to."""

    def replace(self, x: Tensor, step: int) -> None:
        """Goes on from the state x [B, C, h, w], before ``step``; after the last one it is the
        image's end."""

    def finish(self) -> Tensor:
        """The stage's end state [B, C, h, w], float32."""


def run(
    engine: Engine,
    counts: Sequence[int],
    *,
    progress: Callable[[int], object] | None = None,
    callback: Callable[[StepInfo], Tensor | None] | None = None,
) -> list[Tensor]:
    """The end state of every stage [B, C, h, w], float32.

    Args:
        engine: made for stages of ``counts`` steps.
        counts: steps of each stage.
        progress: called with the number of steps taken since the last call.
        callback: as ``sample``'s. The engine takes one step at a time.
    """
    ends: list[Tensor] = []
    for stage, count in enumerate(counts, start=1):
        engine.begin(stage)
        step = 0
        while step < count:
            taken = engine.step(step)
            step += taken
            if progress is not None:
                progress(taken)
            if callback is not None:
                tau, before = place_steps(count)[step - 1].tau, sum(counts[: stage - 1])
                info = StepInfo(before + step - 1, sum(counts), stage, tau, engine.image())
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

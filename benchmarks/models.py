"""Whole models to time: E-CAR three ways over one set of weights; short runs scaled to an image."""

import contextlib
import copy
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import ecar_kernels
from ecar import ECAR, ECARConfig, split_steps
from ecar.sampling.guidance import PAPER, Steps, plan_steps
from ecar.sampling.sampler import run_eagerly
from ecar.sampling.stage import Shape

STEPS: Steps = PAPER  # of the paper's tables: 250 even Euler steps
WEIGHT_SCALE = 0.02


def random_model(config: ECARConfig) -> ECAR:
    """Random weights, those that begin as zero included: nothing may be multiplied by zero."""
    model = ECAR(config).eval()
    for head in model.heads:
        for weight in (head.modulation.weight, head.output.weight):
            nn.init.normal_(weight, std=WEIGHT_SCALE)
    return model


def twin(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the very same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


def compiled(model: ECAR, whole: bool = True) -> ECAR:
    """A twin whose flow heads are compiled, and the AR's norms and MLPs; on first use.

    The AR's attention writes to a cache whose state is in Python, a graph for each layer.

    whole: each head's velocity is one graph. Otherwise its repeated block is compiled, one graph
    for each stage (PyTorch's regional compilation, which it recommends for deep models: compile
    time does not grow with the depth), and its modulations and embedding; the last projection
    stays eager.
    """
    model = twin(model)
    for head in model.heads:
        methods = ("velocity",) if whole else ("embed_tokens",)
        for name in (*methods, "spatial_modulation", "step_modulation"):
            setattr(head, name, torch.compile(getattr(head, name), dynamic=False))
        for block in () if whole else head.blocks:
            block.infer = torch.compile(block.infer, dynamic=False)
    for block in model.ar.blocks:
        block.norm1 = torch.compile(block.norm1, dynamic=False)
        block.mlp = torch.compile(block.mlp, dynamic=False)
    return model


def accelerated(model: ECAR) -> ECAR:
    """A twin as a user has it after `ecar_kernels.accelerate`; with packed weights."""
    copied = twin(model)
    ecar_kernels.accelerate(copied, backend="auto")
    return copied


def pipelines(model: ECAR, dtype: torch.dtype) -> ECAR:
    """A copy as a pipeline has it: in that dtype, with packed weights in place of the plain."""
    copied = copy.deepcopy(model).to(dtype)
    ecar_kernels.accelerate(copied, backend="auto", keep_weights=False)
    return copied


@dataclass(frozen=True)
class Way:
    """A model under the backend that serves it."""

    model: ECAR
    backend: str

    def backend_in_force(self) -> contextlib.AbstractContextManager:
        return ecar_kernels.use_backend(self.backend)


def ways(model: ECAR, compile: str | None = "whole") -> dict[str, Way]:
    """The reference in eager mode, compiled (by "whole" heads or by "blocks"), and accelerated."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # a graph for each head of each stage
    found = {"eager": Way(model, "reference")}
    if compile is not None:
        found["compiled"] = Way(compiled(model, compile == "whole"), "reference")
    return found | {"ours": Way(accelerated(model), "auto")}


@dataclass(frozen=True)
class StageTime:
    """Seconds of one stage: what is done once, and one step."""

    once: float
    step: float

    def total(self, steps: int) -> float:
        return self.once + steps * self.step


def time_image(
    way: Way, timed_steps: int | None, steps: Steps = STEPS, *, batch: int = 1
) -> list[StageTime]:
    """Each stage's time for images of `steps` steps, of which `timed_steps` a stage are run; None
    runs all of them, at least three a stage.

    The sampler's own loop runs. `once` is what precedes a stage's first step (the AR's pass, the
    tokens' modulation, and the modulation of all `steps`, whose rows beyond those of the steps
    that are run are timed apart), and what its last step takes longer than the others' median.
    """
    config = way.model.config
    counts, solver, grid = plan_steps(steps, None, None, config.num_stages)
    run = tuple(counts if timed_steps is None else [max(3, timed_steps)] * config.num_stages)
    stamps: list[float] = []  # after each step
    labels, seeds = torch.randint(config.num_classes, (batch,)), torch.randint(2**62, (batch,))
    shape = Shape(batch, run, solver, tuple((False,) * count for count in run))
    with way.backend_in_force(), torch.no_grad():
        begin = time.perf_counter()
        run_eagerly(
            way.model,
            shape,
            labels,
            seeds,
            [[1.0] * count for count in run],
            grid,
            progress=lambda taken: stamps.append(time.perf_counter()),
        )
        found = []
        for timed, count, head in zip(run, counts, way.model.heads, strict=True):
            at, stamps = stamps[:timed], stamps[timed:]
            lengths = [later - earlier for earlier, later in itertools.pairwise(at)]
            step = statistics.median(lengths[:-1])
            rest = (at[0] - begin) + lengths[-1] - 2 * step
            found.append(StageTime(rest + _more_rows(head, timed, count), step))
            begin = at[-1]
    return found


@torch.no_grad()
def _more_rows(head: nn.Module, timed: int, count: int) -> float:
    """What the step modulation of all steps takes longer than that of those that were timed."""
    if timed == count:
        return 0.0
    seconds = []
    for rows in (timed + 1, count + 1):
        begin = time.perf_counter()
        head.step_modulation(torch.linspace(0, 1, rows))
        seconds.append(time.perf_counter() - begin)
    return seconds[1] - seconds[0]


def image_seconds(stages: Sequence[StageTime], steps: Steps = STEPS) -> float:
    counts = split_steps(steps, len(stages))
    return sum(stage.total(count) for stage, count in zip(stages, counts, strict=True))

"""Whole models to time: E-CAR three ways over one set of weights; short runs scaled to an image."""

import copy
import functools
import gc
import itertools
import operator
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

import ecar_kernels
from benchmarks import commands, timing
from ecar import ECAR, ECARConfig, split_steps
from ecar.info import count_multiply_adds, count_parameters
from ecar.sampling.guidance import PAPER, Steps, plan_steps
from ecar.sampling.sampler import run_eagerly
from ecar.sampling.stage import Shape
from ecar_kernels.costs import Rates
from ecar_kernels.flow_block import packing

TIMED_STEPS = 4  # of each stage, where not all are run
SHARES = {"S": 1, "B": 3, "L": 5}  # of the time: an image of L takes longest
WEIGHT_SCALE = 0.02
compare = functools.partial(timing.rounds, at_least=3, warm_up=True)  # of whole images


def random_model(config: ECARConfig) -> ECAR:
    """Random weights, those that begin as zero included: nothing may be multiplied by zero."""
    model = ECAR(config).eval()
    for head in model.heads:
        for weight in (head.modulation.weight, head.output.weight):
            nn.init.normal_(weight, std=WEIGHT_SCALE)
    return model


def linears(blocks: Iterable[nn.Module]) -> list[nn.Linear]:
    """The layers of the fused products of AR or flow blocks."""
    return [layer for b in blocks for layer in (b.qkv, b.proj, b.mlp.fc1, b.mlp.fc2)]


def twin(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the very same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


def compiled(model: ECAR, whole: bool) -> ECAR:
    """A twin whose flow heads are compiled, and the AR's norms and MLPs; on first use.

    The AR's attention writes to a cache whose state is in Python, a graph for each layer.

    whole: each head's velocity is one graph. Otherwise its repeated block is compiled, one graph
    for each stage (PyTorch's regional compilation, which it recommends for deep models), and its
    modulations and embedding; the last projection stays eager.
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


class Way(NamedTuple):
    """A model, and the backend that serves it."""

    model: ECAR
    backend: str = "auto"


def ways(model: ECAR, whole: bool) -> dict[str, Way]:
    """The reference in eager mode and compiled (see `compiled`), and the accelerated model."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # a graph for each head of each stage
    return {
        "eager": Way(model, "reference"),
        "compiled": Way(compiled(model, whole), "reference"),
        "ours": Way(accelerated(model)),
    }


class StageTime(NamedTuple):
    """Seconds of one stage: what is done once, and one step."""

    once: float
    step: float


def time_image(
    way: Way, steps: Steps = PAPER, timed_steps: int | None = TIMED_STEPS
) -> list[StageTime]:
    """Each stage's times for an image, of whose steps `timed_steps` a stage are run, or all (None).

    The sampler's own loop runs, at least three steps a stage. `once` is what precedes a stage's
    first step (the AR's pass, the tokens' modulation, and that of all `steps`, of which those that
    are not run are timed apart), and what its last takes longer than the others' median.
    """
    config = way.model.config
    counts, solver, grid = plan_steps(steps, None, None, config.num_stages)
    run = tuple(counts if timed_steps is None else [timed_steps] * config.num_stages)
    ends: list[float] = []  # of each step
    labels, seeds = torch.randint(config.num_classes, (1,)), torch.randint(2**62, (1,))
    shape = Shape(1, run, solver, tuple((False,) * count for count in run))
    scales = [[1.0] * count for count in run]
    with ecar_kernels.use_backend(way.backend), torch.no_grad():
        begin = time.perf_counter()
        run_eagerly(
            way.model, shape, labels, seeds, scales, grid,
            progress=lambda taken: ends.append(time.perf_counter()),
        )  # fmt: skip
        found = []
        for timed, count, head in zip(run, counts, way.model.heads, strict=True):
            at, ends = ends[:timed], ends[timed:]
            lengths = [later - earlier for earlier, later in itertools.pairwise(at)]
            step = statistics.median(lengths[:-1])
            once = (at[0] - begin) + lengths[-1] - 2 * step
            if timed < count:
                once += _modulation_seconds(head, count) - _modulation_seconds(head, timed)
            found.append(StageTime(once, step))
            begin = at[-1]
    return found


def _modulation_seconds(head: nn.Module, steps: int) -> float:
    times = torch.linspace(0, 1, steps + 1)
    return timing.seconds_of(lambda: head.step_modulation(times))


def image_seconds(stages: Sequence[StageTime], steps: Steps = PAPER) -> float:
    counts = split_steps(steps, len(stages))
    return sum(stage.once + count * stage.step for stage, count in zip(stages, counts, strict=True))


def images(ways: Mapping[str, Way]) -> dict[str, Callable[[], float]]:
    """Seconds of an image by the paper's protocol, each way: what `compare` takes."""
    return {name: lambda way=way: image_seconds(time_image(way)) for name, way in ways.items()}


def floors(
    config: ECARConfig,
    rates: Rates,
    *,
    steps: Steps = PAPER,
    batch: int = 1,
    itemsize: int = 4,
    launch_seconds: float = 0.0,
) -> dict[str, float]:
    """What the rates imply for an image, each taken alone; it takes at least the longest.

    memory: weights are read once a stage, and those of the flow blocks at each step. arithmetic: of
    the matrix products. launches: five of a block and one of the boundary, at each step.
    """
    counts, sizes = split_steps(steps, config.num_stages), count_parameters(config)
    weights = sum(
        sizes[f"flow_head_{stage}"] + sizes["ar_layers"] for stage in range(1, len(counts) + 1)
    )
    again = sum(counts) - len(counts)  # 12 width^2: the linear layers of a block
    weights += again * config.flow_blocks * 12 * config.width**2
    products = sum(stage.total for stage in count_multiply_adds(config, steps=steps))
    return {
        "memory": itemsize * weights / rates.bytes_per_second,
        "arithmetic": batch * products / rates.multiply_adds_per_second,
        "launches": sum(counts) * (5 * config.flow_blocks + 1) * launch_seconds,
    }


def forget() -> None:
    """Frees what a size left behind, for the next one."""
    torch._dynamo.reset()
    packing.forget_packed()
    gc.collect()


def main(
    name: str,
    doc: str,
    measure: Callable[[str, float], dict[str, list]],
    render: Callable[[dict], str],
    *,
    seconds: float,
    words: Sequence[str] = (),
    arguments: Sequence[str] | None = None,
) -> int:
    """The command of a benchmark that measures one size of E-CAR after the other.

    seconds: of S; of B and L as many times more as SHARES says. words: of -k, if none are given.
    """

    def measured(size: str, seconds: float) -> dict[str, list]:
        forget()
        return measure(size, seconds * SHARES[size])

    sizes = {f"E-CAR-{size}": size for size in SHARES}
    how = {"same": operator.itemgetter("size"), "order": [*SHARES], "words": words}
    given = {"seconds": seconds, "arguments": arguments}
    return commands.main(name, doc, measured, sizes, render, **given, **how)

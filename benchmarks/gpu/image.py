"""Latency of whole images, and of a replay's kernels: the AR transformer and all flow steps.

Random weights; wall time until the device has finished. Latents come from `ECARPipeline(...,
output_type="latent")`.
"""

import inspect
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.gpu.timing import measure_rates, synchronize, wall
from benchmarks.gpu.work import Work
from benchmarks.roofline import Roofline, floor
from ecar import ECAR, ECARPipeline, release_graphs, sample
from ecar.sampling.guidance import PAPER
from ecar_kernels import use_backend
from ecar_kernels.costs import Rates

EULER = {"num_inference_steps": PAPER}
# As a user has it who loads a checkpoint and says nothing more.
ACCELERATED = inspect.signature(ECARPipeline.from_pretrained).parameters["accelerate"].default
PROFILED = ([1, 1, 1], [1, 1, 9])  # steps; a step of the last stage is an eighth of the difference


@dataclass(frozen=True)
class Row:
    """way: from_pretrained's default; plain, not accelerated; or PyTorch's references."""

    size: str
    batch: int
    numbers: str  # bfloat16 weights, or float32's with products in tf32
    way: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.numbers == "bfloat16" else torch.float32

    @property
    def name(self) -> str:
        return f"E-CAR-{self.size} batch {self.batch} {self.numbers} {self.way}"

    @property
    def seconds(self) -> float:
        """What it takes at least, roughly: to begin no row that cannot end."""
        return {"S": 3, "B": 5, "L": 7}[self.size] * (1 + self.batch / 32)


# (batch, numbers, way), each of S, B and L; the most telling first.
ORDER = (
    *((1, "bfloat16", "default"), (1, "bfloat16", "plain"), (1, "tf32", "default")),
    *((64, "bfloat16", "default"), (8, "bfloat16", "default"), (64, "tf32", "default")),
    *((64, "bfloat16", "plain"), (8, "bfloat16", "plain"), (8, "tf32", "default")),
    *((batch, "tf32", "plain") for batch in (1, 64, 8)),
)
ROWS = [Row(size, *rest) for rest in ORDER for size in "SBL"]
ROWS.insert(15, Row("S", 1, "bfloat16", "reference"))
DRY_ROWS = [Row("S", 1, "bfloat16", "default"), Row("S", 2, "tf32", "plain")]


def rows(work: Work) -> list[Row]:
    return DRY_ROWS if work.dry else ROWS


def pipeline(
    work: Work, size: str, way: str = "plain", dtype: torch.dtype = torch.float32
) -> ECARPipeline:
    """Random weights on the device, none of them zero."""
    with torch.device("meta" if work.place else work.device):
        model = ECAR(work.config(size))
        with torch.no_grad():  # adaLN-zero's would make every velocity 0
            for head in model.heads:
                torch.nn.init.normal_(head.modulation.weight, std=0.02)
                torch.nn.init.normal_(head.output.weight, std=0.02)
    model.to(dtype)
    if work.place:
        work.place(model)
    return ECARPipeline(model, accelerate=ACCELERATED and way == "default")


def run(work: Work) -> None:
    """The device's rates; a row for each of ROWS and setting, and a replay's profile at batch 1."""
    measure_rates(work)
    for row in rows(work):
        if not work.begins(row.name, row.seconds):
            continue
        with use_backend("reference") if row.way == "reference" else nullcontext():
            try:
                pipe = _ready(work, row)
                for setting, given in _settings(work, pipe).items():
                    found = _measure(work, pipe, row, given)
                    said = asdict(row) | {"setting": setting}
                    work.add(f"{row.name}, {setting}", found.pop("say"), **said, **found)
                if row.batch == 1 and row.way == "default":
                    _profile(work, pipe, row)
                release_graphs(pipe.model)
            except torch.OutOfMemoryError as error:
                work.add(row.name, skipped=str(error).splitlines()[0], **asdict(row))
        del pipe


def _ready(work: Work, row: Row) -> ECARPipeline:
    pipe = pipeline(work, row.size, row.way, row.dtype)
    pipe.tf32 = row.numbers == "tf32"
    return pipe


def _settings(work: Work, pipe: ECARPipeline) -> dict[str, dict[str, Any]]:
    """The paper's 250 Euler steps, and the default: the call's arguments by name."""
    if work.dry:
        return {"6 steps": {"num_inference_steps": 6}}
    return {"250 Euler steps": EULER, "default": {}}


def _draw(pipe: ECARPipeline, batch: int, given: dict[str, Any]) -> Callable[[], Any]:
    """Each call has other classes and seeds."""
    count, classes = itertools.count(), pipe.model.config.num_classes

    def call() -> Any:
        first = batch * next(count)
        seeds = range(first, first + batch)
        labels = [seed % classes for seed in seeds]
        return pipe(labels, **given, seeds=seeds, output_type="latent", progress=False).images

    return call


def _measure(work: Work, pipe: ECARPipeline, row: Row, given: dict[str, Any]) -> dict[str, Any]:
    draw = _draw(pipe, row.batch, given)

    def graphs(on: bool) -> Any:
        pipe.graphs = on  # or an error: an eager figure must not pass for a graph's
        return draw()

    if not work.dry:
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
    begin, why_not, found = time.perf_counter(), None, {}
    try:
        graphs(not work.dry)
        synchronize()
        first = time.perf_counter() - begin
        found["graphs"] = wall(lambda: graphs(not work.dry), work.span(1.0), at_least=3)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why_not, first = str(error).splitlines()[0], None
        graphs(False)
    found["eager"] = wall(lambda: graphs(False), 0.0, at_least=2)
    steps = given.get("num_inference_steps", pipe.defaults["num_inference_steps"])
    needed = Roofline(
        pipe.model.config, batch=row.batch, steps=steps, itemsize=pipe.dtype.itemsize
    ).total()
    result = found | {
        "say": ", ".join(f"{name} {1e3 * value['median']:.1f} ms" for name, value in found.items()),
        "why_no_graph": why_not,
        "first_call": first,
        "launches_at_least": needed.launches,
        "bytes": needed.bytes,
        "multiply_adds": needed.multiply_adds,
        "served": _sampled(pipe, row).served,
    }
    if not work.dry:
        result["peak_bytes"] = torch.cuda.max_memory_allocated() - weights
    if {"copy", "launch", row.numbers} <= work.rates.keys():
        best = min(value["median"] for value in found.values())
        device = Rates(work.rates["copy"], work.rates[row.numbers])
        least = floor(needed, device, work.rates["launch"])
        result |= {f"floor_{name}": value for name, value in asdict(least).items()}
        result["fraction"] = least.seconds / best
    return result


def _sampled(pipe: ECARPipeline, row: Row) -> Any:
    """A step a stage without a graph, of the model as the pipeline has made it."""
    labels = torch.zeros(row.batch, dtype=torch.int64)
    steps = [1] * pipe.model.config.num_stages
    return sample(pipe.model, labels, seeds=labels, steps=steps, graphs=False, tf32=pipe.tf32)


def warm_items(work: Work) -> Iterator[tuple[str, Callable[[], object]]]:
    """One step a stage of each kind of row, without a graph: its kernels are then compiled."""
    for row in rows(work):
        if row.way != "reference":
            yield row.name, lambda row=row: _warm(work, row)


def _warm(work: Work, row: Row) -> None:
    pipe = _ready(work, row)
    pipe._accelerate()
    _sampled(pipe, row)


def _profile(work: Work, pipe: ECARPipeline, row: Row) -> None:
    """A replay's kernels: their times, and the gaps in which none runs."""
    name = f"{row.name}, profile"
    if not work.begins(name, 4):
        return
    counts, pipe.graphs = [], not work.dry
    for steps in PROFILED:
        given = {"num_inference_steps": steps[: pipe.model.config.num_stages], "solver": "euler"}
        draw = _draw(pipe, 1, given)
        draw()
        try:
            events = _events(draw)
        except Exception as error:  # a torch without kineto asserts
            work.add(name, skipped=f"no profiler here: {type(error).__name__}: {error}")
            return
        if not events:
            work.add(name, skipped="the profiler saw nothing on the device")
            return
        counts.append(len(events))
    by_kernel: dict[str, list[float]] = defaultdict(list)
    busy, gaps, end = 0.0, [], events[0][1]
    for kernel, begin, seconds in events:  # kernels may overlap
        by_kernel[kernel].append(seconds)
        gaps.append(max(0.0, begin - end))
        busy += max(0.0, begin + seconds - max(begin, end))
        end = max(end, begin + seconds)
    span = end - events[0][1]
    slowest = sorted(by_kernel, key=lambda kernel: -sum(by_kernel[kernel]))[:20]
    a_step = (counts[1] - counts[0]) / (sum(PROFILED[1]) - sum(PROFILED[0]))
    work.add(
        name,
        f"{len(events)} kernels in {1e3 * span:.2f} ms, {busy / span:.0%} busy",
        kernels=len(events),
        span=span,
        busy=busy,
        median_gap=statistics.median(gaps),
        launches_a_step=None if work.dry else a_step,
        slowest={kernel: [len(by_kernel[kernel]), sum(by_kernel[kernel])] for kernel in slowest},
    )


def _events(call: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """(name, begin, seconds) of what ran on the device, or without one on the CPU, in order."""
    kind = "CUDA" if torch.cuda.is_available() else "CPU"
    activity = getattr(torch.profiler.ProfilerActivity, kind)
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        synchronize()
    found = [
        (event.name, event.time_range.start / 1e6, event.time_range.elapsed_us() / 1e6)
        for event in profile.events()
        if event.device_type == getattr(torch.autograd.DeviceType, kind)
    ]
    return sorted(found, key=lambda event: event[1])

"""Latency of whole images, and of a replay's kernels: the AR transformer and all flow steps.

Random weights; wall time until the device has finished. Latents come from `ECARPipeline(...,
output_type="latent")`.
"""

import functools
import inspect
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from benchmarks import launches
from benchmarks.gpu.timing import measure_rates, synchronize, wall
from benchmarks.gpu.work import Work
from benchmarks.results import duration
from benchmarks.roofline import Floor, Roofline, floor
from ecar import ECAR, ECARPipeline, release_graphs, sample
from ecar_kernels import use_backend
from ecar_kernels.costs import Rates

# As a user has it who loads a checkpoint and says nothing more.
ACCELERATED = inspect.signature(ECARPipeline.from_pretrained).parameters["accelerate"].default
SETTINGS = {"250 Euler steps": "paper", "default": None}  # steps; as in launches.SETTINGS
DRY_SETTINGS = {"6 steps": 6}


class Row(NamedTuple):
    """way: from_pretrained's default; plain, not accelerated; or PyTorch's references."""

    size: str
    batch: int
    numbers: str  # bfloat16 weights, or float32's with products in tf32
    way: str

    @property
    def name(self) -> str:
        return f"E-CAR-{self.size} batch {self.batch} {self.numbers} {self.way}"


DRY_ROWS = [Row("S", 1, "bfloat16", "default"), Row("S", 2, "tf32", "plain")]
# The most telling first.
ROWS = [
    Row(size, batch, numbers, way)
    for batch, numbers, way in sorted(
        itertools.product((1, 64, 8), ("bfloat16", "tf32"), ("default", "plain")),
        key=lambda its: (its[0] > 1) + (its[1] != "bfloat16") + (its[2] != "default"),
    )
    for size in "SBL"
]
ROWS.insert(15, Row("S", 1, "bfloat16", "reference"))


def pipeline(work: Work, row: Row) -> ECARPipeline:
    """Random weights on the device, none of them zero."""
    with torch.device("meta" if work.place else work.device):
        model = ECAR(work.config(row.size))
        with torch.no_grad():  # adaLN-zero's would make every velocity 0
            for head in model.heads:
                torch.nn.init.normal_(head.modulation.weight, std=0.02)
                torch.nn.init.normal_(head.output.weight, std=0.02)
    model.to(torch.bfloat16 if row.numbers == "bfloat16" else torch.float32)
    if work.place:
        work.place(model)
    accelerate = ACCELERATED and row.way == "default"
    return ECARPipeline(model, accelerate=accelerate, tf32=row.numbers == "tf32")


def images(work: Work) -> None:
    """The device's rates; a row for each of ROWS and setting, and a replay's profile at batch 1."""
    measure_rates(work)
    for row in DRY_ROWS if work.dry else ROWS:
        # What it takes at least, roughly: to begin no row that cannot end.
        if not work.begins(row.name, {"S": 3, "B": 5, "L": 7}[row.size] * (1 + row.batch / 32)):
            continue
        with use_backend("reference") if row.way == "reference" else nullcontext():
            try:
                _row(work, row, pipeline(work, row))
            except torch.OutOfMemoryError as error:
                work.add(row.name, skipped=str(error).splitlines()[0], **row._asdict())


def warm_items(work: Work) -> Iterator[tuple[str, Callable[[], object]]]:
    """One step a stage of each kind of row, without a graph: its kernels are then compiled."""
    for row in DRY_ROWS if work.dry else ROWS:
        if row.way != "reference":
            yield row.name, lambda row=row: _served(pipeline(work, row), row.batch)


def _served(pipe: ECARPipeline, batch: int) -> dict[str, str]:
    """The backends that serve a step a stage, without a graph."""
    pipe._accelerate()
    labels = torch.zeros(batch, dtype=torch.int64)
    steps = [1] * pipe.model.config.num_stages
    return sample(
        pipe.model, labels, seeds=labels, steps=steps, graphs=False, tf32=pipe.tf32
    ).served


def _row(work: Work, row: Row, pipe: ECARPipeline) -> None:
    weights = 0 if work.dry else torch.cuda.memory_allocated()
    served, firsts = _served(pipe, row.batch), itertools.count(step=row.batch)

    def draw(steps: Any, graphs: bool) -> None:
        """Each call has other classes and seeds."""
        seeds = range(first := next(firsts), first + row.batch)
        labels = [seed % pipe.model.config.num_classes for seed in seeds]
        pipe.graphs = graphs  # or an error: an eager figure must not pass for a graph's
        pipe(labels, steps, seeds=seeds, output_type="latent", progress=False)

    for setting, steps in (DRY_SETTINGS if work.dry else SETTINGS).items():
        found = row._asdict() | {"group": "images", "setting": setting, "served": served}
        graph = functools.partial(draw, steps, not work.dry)
        eager = functools.partial(draw, steps, False)
        ways: dict[str, Any] = {}
        if not work.dry:
            torch.cuda.reset_peak_memory_stats()
        try:
            begin = time.perf_counter()
            graph()
            synchronize()
            found["first_call"] = time.perf_counter() - begin
            ways["graphs"] = wall(graph, work.span(1.0), at_least=3)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            found["why_no_graph"] = str(error).splitlines()[0]
            eager()
        ways["eager"] = wall(eager, 0.0, at_least=2)
        if not work.dry:
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - weights
        medians = {name: way["median"] for name, way in ways.items()}
        best, floors = min(medians.values()), _floor(work, row, pipe, steps)
        found |= {"ways": ways, "image": best / row.batch, "floors": vars(floors)}
        found["fraction"] = floors.seconds / best
        if (row.batch, row.numbers, row.way) == (1, "bfloat16", "default") and not work.dry:
            chip = torch.cuda.get_device_name()
            medians["predicted"] = found["predicted"] = launches.predicted_seconds(
                row.size, setting, chip
            )
        said = ", ".join(f"{name} {duration(seconds)}" for name, seconds in medians.items())
        work.add(f"{row.name}, {setting}", said, **found)
    if row.batch == 1 and row.way == "default" and work.begins(f"{row.name}, profile", 4):
        _profile(work, f"{row.name}, profile", graph)
    release_graphs(pipe.model)


def _floor(work: Work, row: Row, pipe: ECARPipeline, steps: Any) -> Floor:
    """What must be read, multiplied and launched at least."""
    steps = pipe.defaults["num_inference_steps"] if steps is None else steps
    size, rates = pipe.dtype.itemsize, work.rates
    least = Roofline(pipe.model.config, batch=row.batch, steps=steps, itemsize=size).total()
    return floor(least, Rates(rates["copy"], rates[row.numbers]), rates["launch"])


def _profile(work: Work, name: str, draw: Callable[[], Any]) -> None:
    """A replay's kernels: their times, and for how long one runs."""
    kind = "CPU" if work.dry else "CUDA"
    activity = getattr(torch.profiler.ProfilerActivity, kind)
    try:
        with torch.profiler.profile(activities=[activity]) as profile:
            draw()
            synchronize()
    except Exception as error:  # a torch without kineto asserts
        work.add(name, skipped=f"no profiler here: {type(error).__name__}: {error}")
        return
    where = getattr(torch.autograd.DeviceType, kind)
    ranges = [(e.time_range, e.name) for e in profile.events() if e.device_type == where]
    events = sorted((range.start / 1e6, range.end / 1e6, kernel) for range, kernel in ranges)
    if not events:
        work.add(name, skipped="the profiler saw nothing on the device")
        return
    by_kernel: dict[str, list[float]] = defaultdict(list)
    busy, last = 0.0, 0.0
    for begin, end, kernel in events:  # kernels may overlap
        by_kernel[kernel].append(end - begin)
        busy += max(0.0, end - max(begin, last))
        last = max(end, last)
    span = last - events[0][0]
    slowest = sorted((sum(its), len(its), kernel) for kernel, its in by_kernel.items())[:-21:-1]
    table = "\n".join(f"{duration(s):>8} {count:5} x {kernel}" for s, count, kernel in slowest)
    said = f"{len(events)} kernels in {1e3 * span:.2f} ms, {busy / span:.0%} busy"
    work.add(name, said, kernels=len(events), span=span, busy=busy, output=table)

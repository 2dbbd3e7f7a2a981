"""Latency of whole images, and of a replay's kernels: the AR transformer and all flow steps.

Random weights; wall time of `ecar.sample` until the device has finished.
"""

import functools
import inspect
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from benchmarks import launches, models, timing
from benchmarks.gpu.work import Work
from ecar import ECARPipeline, release_graphs, sample
from ecar.sampling.guidance import Steps
from ecar.sampling.sampler import SampleOutput
from ecar_kernels import use_backend
from ecar_kernels.costs import Rates

# As a user has it who loads a checkpoint and says nothing more.
ACCELERATED = inspect.signature(ECARPipeline.from_pretrained).parameters["accelerate"].default
SETTINGS = {name: steps for name, (steps, _) in launches.SETTINGS.items()}
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
        model = models.random_model(work.config(row.size))
    model.to(torch.bfloat16 if row.numbers == "bfloat16" else torch.float32)
    if work.place:
        work.place(model)
    pipe = ECARPipeline(model, accelerate=ACCELERATED and row.way == "default")
    pipe._accelerate()
    return pipe


def draw(pipe: ECARPipeline, row: Row, steps: Steps, graphs: bool | str) -> SampleOutput:
    """Images of other noise at each call."""
    labels = torch.zeros(row.batch, dtype=torch.int64)
    seeds = torch.randint(2**62, (row.batch,))
    how = {"steps": steps, "graphs": graphs, "tf32": row.numbers == "tf32"}
    drawn = sample(pipe.model, labels, seeds=seeds, **how)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return drawn


def warm_items(work: Work) -> Iterator[tuple[str, Callable[[], object]]]:
    """One step a stage of each kind of row, without a graph: its kernels are then compiled."""

    def once(row: Row) -> None:
        draw(pipeline(work, row), row, [1] * work.config(row.size).num_stages, False)

    for row in DRY_ROWS if work.dry else ROWS:
        if row.way != "reference":
            yield row.name, functools.partial(once, row)


def latency(work: Work) -> None:
    """The device's rates; a row for each of ROWS and setting, and a replay's profile at batch 1."""
    small = {"copy_bytes": 2**16, "width": 16} if work.dry else {}
    rates = timing.measure_rates(5.0 * (not work.dry), work.device, **small)
    work.add("rates, a second", **rates[1])
    for row in DRY_ROWS if work.dry else ROWS:
        # What it takes at least, roughly: to begin no row that cannot end.
        if not work.begins(row.name, {"S": 3, "B": 5, "L": 7}[row.size] * (1 + row.batch / 32)):
            continue
        with use_backend("reference" if row.way == "reference" else "auto"):
            try:
                pipe = pipeline(work, row)
                for setting, steps in (DRY_SETTINGS if work.dry else SETTINGS).items():
                    _measure(work, row, pipe, setting, steps, *rates)
                if row.batch == 1 and row.way == "default" and work.begins(row.name, 4):
                    again = functools.partial(draw, pipe, row, steps, "auto")
                    _profile(work, f"{row.name}, profile", again)
                release_graphs(pipe.model)
            except torch.OutOfMemoryError as error:
                work.add(row.name, skipped=str(error).splitlines()[0], **row._asdict())


def _measure(
    work: Work,
    row: Row,
    pipe: ECARPipeline,
    setting: str,
    steps: Steps,
    best: Rates,
    tried: dict[str, float],
) -> None:
    weights = 0 if work.dry else torch.cuda.memory_allocated()
    first = draw(pipe, row, steps, "auto")
    # Or an error: an eager figure must not pass for a graph's.
    graphs = {"eager": False} | ({} if first.why_not_graph else {"graph": True})
    ways = {
        way: lambda graph=graph: timing.seconds_of(lambda: draw(pipe, row, steps, graph))
        for way, graph in graphs.items()
    }
    taken = timing.rounds(ways, 1.0 * (not work.dry), at_least=3)
    seconds = {way: statistics.median(values) for way, values in taken.items()}
    fastest, peak, predicted = min(seconds.values()), None, None
    if not work.dry:
        peak, predicted = torch.cuda.max_memory_allocated() - weights, _predicted(row, setting)
        torch.cuda.reset_peak_memory_stats()
    products = tried.get(f"GEMM: {row.numbers}", best.multiply_adds_per_second)
    floors = models.floors(
        pipe.model.config,
        Rates(best.bytes_per_second, products),
        steps=steps,
        batch=row.batch,
        itemsize=pipe.dtype.itemsize,
        launch_seconds=1 / tried.get("launch", math.inf),
    )
    shown = seconds if predicted is None else seconds | {"predicted": predicted}
    work.add(
        f"{row.name}, {setting}",
        ", ".join(f"{way} {1e3 * its:.1f} ms" for way, its in shown.items()),
        **row._asdict(),
        setting=setting,
        served=first.served,
        seconds=seconds,
        why_no_graph=first.why_not_graph,
        peak_bytes=peak,
        image_seconds=fastest / row.batch,
        floor_seconds=floors,
        of_the_floor=max(floors.values()) / fastest,
        predicted_seconds=predicted,
    )


def _predicted(row: Row, setting: str) -> float | None:
    """By the committed prediction, where there is one for the row and the GPU."""
    if (row.batch, row.numbers, row.way) != (1, "bfloat16", "default"):
        return None
    return launches.predicted_seconds(row.size, setting, torch.cuda.get_device_name())


def _profile(work: Work, name: str, run: Callable[[], object]) -> None:
    """A replay's kernels, the slowest first, and the share of the time for which they run."""
    kind = "CPU" if work.dry else "CUDA"
    activity = getattr(torch.profiler.ProfilerActivity, kind)
    try:
        with torch.profiler.profile(activities=[activity]) as profile:
            seconds = timing.seconds_of(run)
        found = profile.key_averages()
    except Exception as error:  # a torch without kineto asserts
        work.add(name, skipped=f"no profiler here: {type(error).__name__}: {error}")
        return
    column = f"self_{'cpu' if work.dry else 'device'}_time_total"
    busy = sum(getattr(its, column) for its in found) / 1e6
    kernels = sum(its.count for its in found)
    said = f"{kernels} kernels in {1e3 * seconds:.2f} ms, {busy / seconds:.0%} busy"
    slowest = found.table(sort_by=column, row_limit=20, max_name_column_width=60)
    work.add(name, said, kernels=kernels, busy_seconds=busy, output=slowest)

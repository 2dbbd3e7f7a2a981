"""Latency of whole images, and of a replay's kernels: the AR transformer and all flow steps.

Random weights; wall time until the device has finished. Latents come from `ECARPipeline(...,
output_type="latent")`; where diffusers is installed, the decoder of SDXL's VAE (random weights,
the same sizes) is timed as well.
"""

import importlib.util
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

from benchmarks.gpu import rates
from benchmarks.gpu.timing import synchronize, wall
from benchmarks.gpu.work import Work
from benchmarks.roofline import Roofline, floor
from ecar.model import ECAR
from ecar.pipeline import ECARPipeline
from ecar.sampling import SampleOutput, release_graphs, sample
from ecar_kernels import use_backend
from ecar_kernels.costs import Rates

EULER = {"num_inference_steps": 250, "solver": "euler"}
# As a user has it who loads a checkpoint and says nothing more.
ACCELERATED = inspect.signature(ECARPipeline.from_pretrained).parameters["accelerate"].default
WAYS = ("default", "plain", "reference")
PROFILED = ([1, 1, 1], [1, 1, 9])  # steps; a step of the last stage is an eighth of the difference
SDXL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
}


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


# The most telling first.
ROWS = (
    *(Row(size, 1, "bfloat16", way) for way in WAYS[:2] for size in "SBL"),
    *(Row(size, 1, "tf32", "default") for size in "SBL"),
    *(Row(size, 64, "bfloat16", "default") for size in "SBL"),
    *(Row(size, 8, "bfloat16", "default") for size in "SBL"),
    Row("S", 1, "bfloat16", "reference"),
    *(Row(size, 64, "tf32", "default") for size in "SBL"),
    *(Row(size, batch, "bfloat16", "plain") for batch in (64, 8) for size in "SBL"),
    *(Row(size, 8, "tf32", "default") for size in "SBL"),
    *(Row(size, batch, "tf32", "plain") for batch in (1, 64, 8) for size in "SBL"),
)
DRY_ROWS = (Row("S", 1, "bfloat16", "default"), Row("S", 2, "tf32", "plain"))


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
    rates.run(work)
    _decoder(work)
    for row in DRY_ROWS if work.dry else ROWS:
        if not work.begins(row.name, row.seconds):
            continue
        context = use_backend("reference") if row.way == "reference" else nullcontext()
        with context:
            try:
                pipe = _ready(work, row)
                for setting, given in _settings(work, pipe).items():
                    found = _measure(work, pipe, row, given)
                    work.add(
                        f"{row.name}, {setting}",
                        found.pop("say"),
                        **asdict(row),
                        setting=setting,
                        **found,
                    )
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
    """Euler's 250 steps, and the default where it is another: the call's arguments by name."""
    if work.dry:
        return {"6 steps": {"num_inference_steps": 6}}
    steps = {"250 Euler steps": EULER}
    default = {name: pipe.defaults[name] for name in EULER}
    return steps if default == EULER else {**steps, "default": {}}


def _draw(pipe: ECARPipeline, batch: int, given: dict[str, Any]) -> Callable[[], Any]:
    """Each call has other classes and seeds."""
    count, classes = itertools.count(), pipe.model.config.num_classes

    def call() -> Any:
        first = batch * next(count)
        return pipe(
            [(first + i) % classes for i in range(batch)],
            **given,
            seeds=range(first, first + batch),
            output_type="latent",
            progress=False,
        ).images

    return call


def _measure(work: Work, pipe: ECARPipeline, row: Row, given: dict[str, Any]) -> dict[str, Any]:
    draw = _draw(pipe, row.batch, given)

    def on() -> Any:
        pipe.graphs = not work.dry  # or an error: an eager figure must not pass for a graph's
        return draw()

    def off() -> Any:
        pipe.graphs = False
        return draw()

    if not work.dry:
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
    begin, why_not, found = time.perf_counter(), None, {}
    try:
        on()
        synchronize()
        first = time.perf_counter() - begin
        found |= wall({"graphs": on}, work.span(1.0), rounds=3)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why_not, first = str(error).splitlines()[0], None
        off()
    found |= wall({"eager": off}, 0.0, rounds=2)
    steps = given.get("num_inference_steps", pipe.defaults["num_inference_steps"])
    roofline = Roofline(
        pipe.model.config, batch=row.batch, steps=steps, itemsize=pipe.dtype.itemsize
    ).total()
    result = found | {
        "why_no_graph": why_not,
        "first_call": first,
        "launches_at_least": roofline.launches,
        "bytes": roofline.bytes,
        "multiply_adds": roofline.multiply_adds,
        "served": _sampled(work, pipe, row).served,
    }
    if not work.dry:
        result["peak_bytes"] = torch.cuda.max_memory_allocated() - weights
    best = min(found[name]["median"] for name in found)
    result["say"] = ", ".join(f"{name} {1e3 * found[name]['median']:.1f} ms" for name in found)
    if {"copy", "launch", row.numbers} <= work.rates.keys():
        least = floor(
            roofline, Rates(work.rates["copy"], work.rates[row.numbers]), work.rates["launch"]
        )
        result |= {
            "floor_memory": least.memory,
            "floor_arithmetic": least.arithmetic,
            "floor_launches": least.launches,
            "fraction": least.seconds / best,
        }
    return result


def _sampled(work: Work, pipe: ECARPipeline, row: Row) -> SampleOutput:
    """A step a stage without a graph, of the model as the pipeline has made it."""
    labels = torch.zeros(row.batch, dtype=torch.int64)
    return sample(
        pipe.model,
        labels,
        seeds=labels,
        steps=[1] * pipe.model.config.num_stages,
        graphs=False,
        tf32=pipe.tf32,
    )


def warm_items(work: Work) -> Iterator[tuple[str, Callable[[], object]]]:
    """One step a stage of each kind of row, without a graph: its kernels are then compiled."""
    for row in DRY_ROWS if work.dry else ROWS:
        if row.way != "reference":
            yield row.name, lambda row=row: _warm(work, row)


def _warm(work: Work, row: Row) -> None:
    pipe = _ready(work, row)
    pipe._accelerate()
    _sampled(work, pipe, row)


def _profile(work: Work, pipe: ECARPipeline, row: Row) -> None:
    """A replay's kernels: their times, and the gaps in which none runs."""
    name = f"{row.name}, profile"
    if not work.begins(name, 4):
        return
    counts, pipe.graphs = [], not work.dry
    for steps in [counts[: pipe.model.config.num_stages] for counts in PROFILED]:
        draw = _draw(pipe, 1, {"num_inference_steps": steps, "solver": "euler"})
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
    for kernel, _, seconds in events:
        by_kernel[kernel].append(seconds)
    busy, gaps, end = 0.0, [], events[0][1]
    for _, begin, seconds in events:  # kernels may overlap
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
    on_gpu = torch.cuda.is_available()
    kind = "CUDA" if on_gpu else "CPU"
    with torch.profiler.profile(
        activities=[getattr(torch.profiler.ProfilerActivity, kind)]
    ) as profile:
        call()
        synchronize()
    wanted = getattr(torch.autograd.DeviceType, kind)
    found = [
        (event.name, event.time_range.start / 1e6, event.time_range.elapsed_us() / 1e6)
        for event in profile.events()
        if event.device_type == wanted
    ]
    return sorted(found, key=lambda event: event[1])


def _decoder(work: Work) -> None:
    """Seconds to decode one image and eight by SDXL's VAE in bfloat16, where there is one."""
    if work.dry or importlib.util.find_spec("diffusers") is None:
        work.add(
            "VAE's decoder", skipped="a dry run" if work.dry else "diffusers is not installed here"
        )
        return
    from diffusers import AutoencoderKL

    from ecar.codec import AutoencoderKLCodec

    codec = AutoencoderKLCodec(AutoencoderKL(**SDXL_VAE)).to(work.device, torch.bfloat16)
    for batch in (1, 8):
        latents = torch.randn(batch, 4, 32, 32, device=work.device)
        call = {"decode": lambda latents=latents: codec.decode(latents)}
        wall(call, 0.0, rounds=3)
        work.add(f"VAE's decoder, batch {batch}", **wall(call, 0.3)["decode"])

"""Latency of whole images: the AR transformer, all flow steps, and the VAE's decoder.

Random weights; wall time until the device has finished, variants of a row in turn. Latents come
from `ECARPipeline(..., output_type="latent")`; where diffusers is installed, the decoder of
SDXL's VAE (random weights, the same sizes) is timed as well and added.
"""

import importlib.util
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.timing import synchronize, wall
from benchmarks.gpu.work import Work
from benchmarks.roofline import Roofline, floor
from ecar.model import ECAR
from ecar.pipeline import ECARPipeline
from ecar.sampler import release_graphs
from ecar_kernels import use_backend
from ecar_kernels.costs import Rates

STEPS = 250
GUIDANCE = 2.0
SDXL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "norm_num_groups": 32, "sample_size": 256,
}


@dataclass(frozen=True)
class Row:
    size: str
    batch: int
    guided: bool
    numbers: str  # bfloat16 weights, or float32's with products in tf32 or float32

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.numbers == "bfloat16" else torch.float32


# The most telling first.
ROWS = (
    *(Row(size, 1, False, "bfloat16") for size in "SBL"),
    *(Row(size, 1, True, "bfloat16") for size in "SBL"),
    *(Row(size, 1, False, "tf32") for size in "SBL"),
    *itertools.starmap(Row, itertools.product("SBL", (64, 8), (False, True), ("bfloat16",))),
    Row("S", 1, False, "float32"),
)
DRY_ROWS = (Row("S", 1, False, "bfloat16"), Row("S", 2, True, "float32"))


def run(work: Work) -> None:
    """A row for each of ROWS, while time is left; then the baseline of plain PyTorch."""
    decode = _decoder(work)
    pipelines: dict[str, ECARPipeline] = {}
    for row in DRY_ROWS if work.dry else ROWS:
        if work.left < 8:
            work.add(**asdict(row), skipped="no time left")
            continue
        if row.size not in pipelines:
            pipelines[row.size] = _pipeline(work, row.size)
        try:
            found = _measure(work, pipelines[row.size], row, decode)
        except torch.OutOfMemoryError as error:
            found = {"skipped": str(error).splitlines()[0]}
        work.add(**asdict(row), **found)
        release_graphs(pipelines[row.size].model)
    _baseline(work, pipelines["S"])


def _pipeline(work: Work, size: str) -> ECARPipeline:
    with torch.device(work.device):
        model = ECAR(work.config(size))
    with torch.no_grad():  # adaLN-zero's would make every velocity 0
        for head in model.heads:
            torch.nn.init.normal_(head.modulation.weight, std=0.02)
            torch.nn.init.normal_(head.output.weight, std=0.02)
    return ECARPipeline(model)


def _steps(work: Work) -> int:
    return 6 if work.dry else STEPS


def _draw(
    work: Work, pipe: ECARPipeline, batch: int, guided: bool, *, steps: list[int] | None = None
) -> Callable[[], Any]:
    """Each call has other classes and seeds."""
    count, classes = itertools.count(), pipe.model.config.num_classes

    def call() -> Any:
        first = batch * next(count)
        return pipe(
            [(first + i) % classes for i in range(batch)], steps or _steps(work),
            GUIDANCE if guided else 1.0, seeds=range(first, first + batch),
            output_type="latent", progress=False,
        ).images

    return call


def warm(rows: Sequence[Row], *, dry: bool = False) -> None:
    """One step a stage of each row, without a graph: its kernels are then in Triton's cache."""
    work = Work(Path(os.devnull), time.time() + 600, dry)
    for row in rows:
        pipe = _pipeline(work, row.size).to(row.dtype)
        pipe.graphs, pipe.tf32 = False, row.numbers == "tf32"
        _draw(work, pipe, row.batch, row.guided, steps=[1] * pipe.model.config.num_stages)()
        print(f"warm: {row}", flush=True)


def _measure(work: Work, pipe: ECARPipeline, row: Row, decode: Callable[[int], float | None]
             ) -> dict[str, Any]:
    pipe.to(row.dtype)
    pipe.tf32 = row.numbers == "tf32"
    draw = _draw(work, pipe, row.batch, row.guided)

    def on() -> Any:
        pipe.graphs = not work.dry  # or an error: an eager figure must not pass for a graph's
        return draw()

    def off() -> Any:
        pipe.graphs = False
        return draw()

    off()
    synchronize()
    if not work.dry:
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()  # and those of the other sizes
    begin, calls, why_not = time.perf_counter(), {"graphs": on, "eager": off}, None
    try:
        on()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why_not = str(error).splitlines()[0]
        del calls["graphs"]
    synchronize()
    first = time.perf_counter() - begin
    found = wall(calls, work.span(1.5), rounds=3)
    roofline = Roofline(pipe.model.config, batch=row.batch, steps=_steps(work),
                        guided=row.guided, itemsize=pipe.dtype.itemsize).total()
    result = found | {"why_no_graph": why_not, "first_call": first, "decode": decode(row.batch),
                      "launches_at_least": roofline.launches, "bytes": roofline.bytes,
                      "multiply_adds": roofline.multiply_adds}
    if not work.dry:
        result["peak_bytes"] = torch.cuda.max_memory_allocated() - weights
    if {"copy", "launch", row.numbers} <= work.rates.keys():
        least = floor(roofline, Rates(work.rates["copy"], work.rates[row.numbers]),
                      work.rates["launch"])
        result |= {"floor_memory": least.memory, "floor_arithmetic": least.arithmetic,
                   "floor_launches": least.launches,
                   "fraction": least.seconds / min(found[name]["median"] for name in found)}
    return result


def _decoder(work: Work) -> Callable[[int], float | None]:
    """Seconds to decode a batch by SDXL's VAE in bfloat16, or None where there is none."""
    if work.dry or importlib.util.find_spec("diffusers") is None:
        work.add(note="the VAE's decoder is not timed: "
                 + ("a dry run" if work.dry else "diffusers is not installed here"))
        return lambda batch: None
    from diffusers import AutoencoderKL

    from ecar.codec import AutoencoderKLCodec

    codec = AutoencoderKLCodec(AutoencoderKL(**SDXL_VAE)).to(work.device, torch.bfloat16)
    known: dict[int, float] = {}

    def decode(batch: int) -> float:
        if batch not in known:
            latents = torch.randn(batch, 4, 32, 32, device=work.device)
            call = {"decode": lambda: [codec.decode(rows) for rows in latents.split(8)]}
            wall(call, 0.0, rounds=3)
            known[batch] = wall(call, 0.3)["decode"]["median"]
        return known[batch]

    return decode


def _baseline(work: Work, pipe: ECARPipeline) -> None:
    """E-CAR-S at batch 1 on the plain PyTorch references, and its kernels counted."""
    pipe.to(torch.bfloat16)
    pipe.graphs, pipe.tf32 = False, None
    draw = _draw(work, pipe, 1, False)
    for name, context in (("reference", use_backend("reference")), ("ours", nullcontext())):
        if work.left < 5:
            return
        with context:
            draw()
            found = wall({name: draw}, 0.0, rounds=3)[name]
            work.add(size="S", batch=1, baseline=f"{name}, eager", **found,
                     launches_a_step=None if work.dry else _launches_a_step(work, pipe))


def _launches_a_step(work: Work, pipe: ECARPipeline) -> float:
    """Kernels, copies and fills that a step of the last stage starts, from two runs' profiles."""
    counts = []
    for steps in ([1, 1, 1], [1, 1, 5]):
        draw = _draw(work, pipe, 1, False, steps=steps)
        draw()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            draw()
            synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        counts.append(sum(event.device_type == on_device for event in profile.events()))
    return (counts[1] - counts[0]) / 4


if __name__ == "__main__":
    warm([Row(*values) for values in json.loads(sys.argv[1])])

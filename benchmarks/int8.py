"""Eight bits in the fused products, next to sixteen: what they could save, and what they cost.

An image in bfloat16 by the default steps, without guidance, and its linear layers' products alone,
in one thread's processor time; multiply-adds of the products' inner loop a second on one thread, by
vpdpbusd and by vdpbf16ps, for a weight in the L1 cache and for one of a flow head's size. "at most"
is what an image could gain: its products at the ratio of these rates, and everything else as it is.

Images: the weights of every block's four linear layers rounded to int8 by output, with a scale
each; what they multiply rounded to uint8 by token, with a scale and a zero point, as vpdpbusd takes
them. There is no such kernel: PyTorch multiplies numbers that are rounded so. The rest is float32
or bfloat16. "error" is how far the latents are from the converged trajectories, relative to these;
the other columns are means over groups of images with half of their 95 % confidence intervals.
"""

import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import commands, end_to_end, models, quality, timing
from benchmarks.results import ROOT, duration, medians, table, tables, times
from ecar import ECAR, PRESETS, ECARPipeline, sample, split_steps
from ecar.evaluation import generate
from ecar.evaluation.steps import Setting, Sweep, relative_distance
from ecar.sampling.guidance import DEFAULT_STEPS, plan_steps

CHECKPOINTS = ("digits", "emoji", "mnist")  # names of folders and of their data sets
FORMATS = ("float32", "bfloat16", "int8 in float32", "int8 in bfloat16")
PEAK = Path(__file__).with_name("int8_peak.cpp")
FLAGS = ("-std=c++17", "-O3", "-mavx512f", "-mavx512bf16", "-mavx512vnni")


def by_output(weight: Tensor) -> Tensor:
    """Rounded to 255 numbers a row, zero in their middle, the largest of which is the row's."""
    scale = (weight.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight / scale).round() * scale


def by_token(x: Tensor) -> Tensor:
    """Rounded to 256 numbers a row, from its least to its largest; zero is one of them."""
    least, most = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = ((most - least) / 255).clamp_min(torch.finfo(x.dtype).tiny)
    zero = (-least / scale).round()
    return ((x / scale + zero).round().clamp(0, 255) - zero) * scale


@torch.no_grad()
def round_products(model: ECAR) -> None:
    """From now on. Products are summed in float32 and rounded to the model's type at the end. As
    their `forward` is replaced, no fused op passes the layers by."""

    def rounded(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        weight, bias = by_output(linear.weight.float()), linear.bias.float()
        return lambda x: F.linear(by_token(x.float()), weight, bias).to(x.dtype)

    for linear in models.linears(
        block for part in (model.ar, *model.heads) for block in part.blocks
    ):
        linear.forward = rounded(linear)


class Images:
    """A checkpoint's images in each format, of the same classes and seeds."""

    def __init__(self, name: str, groups: int, images: int, latents: int) -> None:
        self.judge = quality.Judge(name, groups, images)
        self.load = functools.partial(ECARPipeline.from_pretrained, ROOT / "checkpoints" / name)
        plain = self.load()
        placing = (plain.defaults[key] for key in ("num_inference_steps", "solver", "grid"))
        counts, solver, grid = plan_steps(*placing, plain.model.config.num_stages)
        self.setting = Setting(solver, grid, tuple(counts))
        guidance = {key: its for key, its in plain.defaults.items() if key.startswith("guidance_")}
        self.sweep = Sweep(plain, latents, 0, latents, guidance, False)

    def measure(self, way: str) -> dict[str, list]:
        """A format's row."""
        self.sweep.pipeline = its = self.load()
        its.to(torch.bfloat16 if "bfloat16" in way else torch.float32)
        if "int8" in way:
            round_products(its.model)
        error = relative_distance(self.sweep.draw(self.setting), self.sweep.reference)
        measures = self.judge.summary(functools.partial(generate, its, progress=False))
        return {"rows": [{"format": way, "error": error, "measures": measures}]}


def measure_rates() -> dict[str, list[dict[str, float]]]:
    """Multiply-adds a second of one thread, by a program that is compiled here."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        subprocess.run(["c++", *FLAGS, PEAK, "-o", program], check=True)
        said = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=True).stdout
    names = ("weights", "tokens", "bfloat16", "int8")
    lines = [map(float, line.split()) for line in said.splitlines()]
    return {"rates": [dict(zip(names, line, strict=True)) for line in lines]}


def measure_time(name: str, load: Callable[[], ECAR], seconds: float) -> dict[str, list]:
    """Seconds of one thread's processor time: an image, and its linear layers' products."""
    model = models.accelerated(load().to(torch.bfloat16).eval())
    counts = split_steps(DEFAULT_STEPS, model.config.num_stages)
    calls = [
        call
        for count, (once, step) in zip(
            counts, end_to_end.products(model, DEFAULT_STEPS)["linears"], strict=True
        )
        for call in (*once, *step * count)
    ]
    label = torch.zeros(1, dtype=torch.int64)
    ways = {
        "image": lambda: sample(model, label, seeds=label),
        "linears": lambda: [call() for call in calls],
    }

    def processor_seconds(run: Callable[[], object]) -> float:
        begin = time.process_time()
        run()
        return time.process_time() - begin

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            measures = {way: functools.partial(processor_seconds, ways[way]) for way in ways}
            taken = models.compare(measures, seconds)
    finally:
        torch.set_num_threads(threads)
    return {"times": [{"model": name, "seconds": timing.summaries(taken)}]}


def most_gained(row: dict[str, Any], rates: list[dict[str, float]]) -> float:
    """Over bfloat16, with products at the best ratio of the rates."""
    seconds, ratio = medians(row), max(rate["int8"] / rate["bfloat16"] for rate in rates)
    return seconds["image"] / (seconds["image"] - seconds["linears"] * (1 - 1 / ratio))


def render(record: dict[str, Any]) -> str:
    """Of the times and rates, or of a checkpoint's images."""
    if "checkpoint" in record:
        rows = [
            {"products": row["format"], "error": f"{row['error']:.3f}"}
            | quality.cells(row["measures"])
            for row in record["rows"]
        ]
        return (
            f"{table(rows)}\n\n{record['checkpoint']}: {record['groups']} groups of "
            f"{record['images']} images; errors of {record['latents']}."
        )
    found = record.get("rates", [])
    shares = [
        {
            "image": row["model"],
            "bfloat16": duration(seconds["image"]),
            "of which products": f"{seconds['linears'] / seconds['image']:.0%}",
            "at most": times(most_gained(row, found) if found else None),
        }
        for row in record.get("times", [])
        for seconds in [medians(row)]
    ]
    rates = [
        {
            "weights": f"{rate['weights']:,.0f}",
            "tokens": f"{rate['tokens']:.0f}",
            **{way: f"{rate[way] / 1e9:.0f} G/s" for way in ("bfloat16", "int8")},
            "ratio": times(rate["int8"], rate["bfloat16"]),
        }
        for rate in found
    ]
    return tables(shares, rates)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = quality.groups_parser("int8", __doc__, CHECKPOINTS, 512)
    add = parser.add_argument
    add("--seconds", type=float, default=20, help="of timing an image (default: 20)")
    add("--latents", type=int, default=64, help="that errors are of (default: 64)")
    options, content = parser.parse_args(arguments), {}
    load = {"E-CAR-S": lambda: models.random_model(PRESETS["S"])} | {
        name: lambda name=name: ECARPipeline.from_pretrained(ROOT / "checkpoints" / name).model
        for name in options.checkpoints
    }
    files: dict[str, dict[str, commands.Measure]] = {"int8": {"rates": measure_rates}}
    for name in load:
        timed = functools.partial(measure_time, name, load[name], options.seconds)
        files["int8"][f"times of {name}"] = timed
    for name in options.checkpoints:
        sizes = {key: getattr(options, key) for key in ("groups", "images", "latents")}
        images = functools.cache(functools.partial(Images, name, **sizes))
        content[f"int8-{name}"] = {"checkpoint": name, **sizes}
        files[f"int8-{name}"] = {
            f"images of {name}, {way}": lambda images=images, way=way: images().measure(way)
            for way in FORMATS
        }
    how = {"same": _same, "order": FORMATS}
    return commands.run_chosen(parser, options, "int8", files, render, content, **how)


def _same(row: dict[str, Any]) -> Any:
    return row.get("format") or row.get("model") or (row["weights"], row["tokens"])


if __name__ == "__main__":
    sys.exit(main())

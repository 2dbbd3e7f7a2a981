"""`python -m benchmarks.profile`: where the time of a sampler's step goes, op by op.

One step of each stage of an accelerated E-CAR, op after op from Python, under torch's profiler.
Its own cost is part of all figures but the last two rows': that step without it, and a step as the
sampler takes it on the CPU, bound ahead of time (ecar/sampling/cpu.py), where a block is one call
and cannot be looked into.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import environment, models, results
from benchmarks.results import duration, markdown
from benchmarks.timing import seconds_of
from ecar.config import PRESETS, ECARConfig
from ecar.flow import FlowHead
from ecar_kernels import euler_step

BETWEEN = "between the ops"
OPS = {
    "ecar::packed_adaln_linear": "adaln_linear",
    "ecar::packed_linear_gated_residual": "linear_gated_residual",
    "ecar::stage_attention": "attention",
    "aten::scaled_dot_product_attention": "attention",
    "ecar::euler_step": "euler_step",
    "aten::copy_": "copies",
}


@torch.no_grad()
def stage_rows(head: FlowHead, config: ECARConfig, stage: int, steps: int) -> dict[str, Any]:
    """Seconds of a step of one stage: of each op of OPS, and of all that lies between them."""
    tokens = config.stage_tokens[stage - 1]
    spatial = head.spatial_parts(torch.randn(1, tokens, config.width))
    step = head.step_parts(torch.tensor([0.5]))[0]
    x = torch.randn(1, *config.stage_shape(stage))

    def run() -> None:
        euler_step(x, head.velocity(x, spatial, step), 0.01)

    def seconds() -> list[float]:
        return [seconds_of(run) for _ in range(steps)]

    with profile(activities=[ProfilerActivity.CPU]):
        seconds()  # the profiler's first use is slow
    alone = statistics.median(seconds())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        whole = statistics.fmean(seconds())
    found = {
        OPS[event.key]: event.cpu_time_total * 1e-6 / steps
        for event in profiler.key_averages()
        if event.key in OPS
    }
    return {
        "tokens": tokens,
        "step": whole,
        "alone": alone,
        "ops": found,
        BETWEEN: whole - sum(found.values()),
    }


def render(record: dict[str, Any]) -> str:
    stages = record["stages"]
    header = ("a step", *(f"{stage['tokens']} tokens" for stage in stages))
    names = [
        name
        for name in dict.fromkeys(OPS.values())
        if any(name in stage["ops"] for stage in stages)
    ]

    def cell(seconds: float, stage: dict[str, Any]) -> str:
        return f"{duration(seconds)} ({seconds / stage['step']:.0%})"

    rows = [
        (name, *(cell(stage["ops"].get(name, 0.0), stage) for stage in stages)) for name in names
    ]
    rows.append((BETWEEN, *(cell(stage[BETWEEN], stage) for stage in stages)))
    rows.append(("all", *(duration(stage["step"]) for stage in stages)))
    rows.append(("without the profiler", *(duration(stage["alone"]) for stage in stages)))
    if bound := "bound" in stages[0]:  # results of before have none
        rows.append(("as the sampler takes it", *(duration(stage["bound"]) for stage in stages)))
    last = "the last two rows" if bound else "the last row"
    return (
        f"{markdown(header, rows)}\n\nE-CAR-{record['size']}, one image, no guidance, float32, "
        "accelerated; under torch's profiler but for\n" + last + "."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--size", choices=PRESETS, default="S")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--results",
        type=Path,
        default=results.FOLDER,
        help="folder to write <device>/profile.json into",
    )
    options = parser.parse_args(arguments)
    facts, file = environment.describe(), results.path("profile", options.results)
    model = models.accelerated(models.random_model(ECARConfig.preset(options.size)))
    bound = models.time_image(models.Way(model, "auto"), options.steps)
    record = {
        "size": options.size,
        "stages": [
            stage_rows(head, model.config, stage, options.steps) | {"bound": taken.step}
            for (stage, head), taken in zip(enumerate(model.heads, start=1), bound, strict=True)
        ],
    }
    results.write(file, "profile", facts, **record)
    print(f"{render(record)}\n\n{results.where(facts)}\n\nwrote {file}")


if __name__ == "__main__":
    main()

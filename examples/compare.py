"""What the examples share: a model before and after `accelerate`, its outputs and its times."""

import argparse
import copy
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ecar_kernels
from benchmarks import results, timing
from benchmarks.results import duration, figures, markdown


def options(description: str, sizes: Iterable[str], default: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(sizes), default=default)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="to spend on the times")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    return parser


@torch.no_grad()
def compare(
    name: str,
    model: nn.Module,
    call: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    chosen: argparse.Namespace,
) -> dict:
    """Errors and times of `call(model, **inputs)`, plain and accelerated; printed and returned.

    The errors are root mean squares against the model in float64. Raises SystemExit where the
    accelerated one's is more than twice the plain one's plus one unit in the last place.
    """
    facts = results.describe()
    exact = call(
        copy.deepcopy(model).double(),
        **{
            key: value.double() if value.is_floating_point() else value
            for key, value in inputs.items()
        },
    )
    plain = model
    fast = copy.deepcopy(model)
    ecar_kernels.accelerate(fast)
    outputs = {"plain": call(plain, **inputs), "accelerated": call(fast, **inputs)}
    errors = {
        key: (value.double() - exact).square().mean().sqrt().item()
        for key, value in outputs.items()
    }
    unit = torch.finfo(outputs["plain"].dtype).eps * exact.abs().max().item()
    allowed = 2 * errors["plain"] + unit

    clocks = {
        key: timing.Clock(itertools.repeat(lambda model=each: call(model, **inputs)))
        for key, each in (("plain", plain), ("accelerated", fast))
    }
    seconds = timing.summaries(timing.rounds(clocks, chosen.seconds))
    speedup = seconds["plain"]["median"] / seconds["accelerated"]["median"]

    print(f"{name}, batch {chosen.batch}, on {facts['device']}, {facts['threads']} threads")
    for key in outputs:
        print(f"  {key:<12} {1e3 * seconds[key]['median']:9.1f} ms, error {errors[key]:.3g}")
    print(f"  {speedup:.2f} times as fast; error allowed {allowed:.3g}")
    found = {
        "name": name,
        "batch": chosen.batch,
        "seconds": seconds,
        "speedup": speedup,
        "errors": errors,
        "allowed": allowed,
    }
    if chosen.output is not None:
        results.save(chosen.output, {"kind": "example", "runs": [facts], **found})
    if not errors["accelerated"] <= allowed:
        raise SystemExit("the accelerated model's output is not right")
    return found


def render(record: dict[str, Any]) -> str:
    """An example's result as a Markdown table."""
    seconds, errors = record["seconds"], record["errors"]
    header = (
        "model",
        "batch",
        "plain",
        "accelerated",
        "times as fast",
        "error, plain",
        "error, accelerated",
        "allowed",
    )
    row = (
        record["name"],
        str(record["batch"]),
        duration(seconds["plain"]["median"]),
        duration(seconds["accelerated"]["median"]),
        f"{figures(record['speedup'])}x",
        *(f"{value:.2g}" for value in (errors["plain"], errors["accelerated"], record["allowed"])),
    )
    return (
        f"{markdown(header, [row])}\n\nRandom weights, float32. Errors are root mean squares "
        "against the plain model in float64."
    )

"""Peak memory of sampling and of a training step, by ecar_kernels and by eager PyTorch.

MiB, float32. Each figure comes from a process of its own: its peak resident set (VmHWM of Linux's
/proc/self/status), less what it held before the model was made, libraries loaded and ops run once.
Sampling: one image of the paper's 250 steps without guidance, weights packed in place; it takes at
most the weights and 1.5 times the next three columns. Training: two steps with AdamW; the target is
0.75 of eager.
"""

import ctypes
import gc
import multiprocessing
import operator
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import ecar_kernels
from benchmarks import commands, models
from benchmarks.results import tables, times
from ecar import ECAR, ECARConfig, sample, split_steps
from ecar.sampling.guidance import PAPER, Steps

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SLACK = 1.5  # a peak of sampling is at most the weights + 1.5x what sampling needs
BATCH = 16  # of a training step of S
TRAINING = 0.75  # a training step's, of the eager reference's
MIB = 2**20


def resident(field: str = "VmRSS") -> int:
    """Bytes resident now, or with "VmHWM" at most since `reset_peak`."""
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", STATUS.read_text())[1])


def reset_peak() -> int:
    """Gives back what is free, and lets the peak begin at what is resident, which it returns."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")
    return resident()


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def needed(config: ECARConfig, steps: Steps) -> dict[str, int]:
    """Bytes that sampling one image needs besides the weights, at the largest stage, in float32.

    modulation: of all tokens, and of all steps. kv_cache: keys and values of all layers.
    activations: what one flow block makes of its tokens: q, k, v, attention's output, the
    stream, the hidden layer, the stream again: 10 [N, C] with an MLP ratio of 4.
    """
    tokens, width = config.stage_tokens[-1], config.width
    rows = tokens + max(split_steps(steps, config.num_stages))
    return {
        "modulation": 4 * rows * (6 * config.flow_blocks + 2) * width,
        "kv_cache": 4 * 2 * config.ar_layers * config.num_tokens * width,
        "activations": 4 * tokens * (6 * width + config.mlp_width),
    }


def sampling(size: str) -> dict[str, Any]:
    """Peak of one image in this process; weights are packed in place."""
    zero, config = torch.zeros(1, dtype=torch.int64), ECARConfig.preset(size)
    tiny = ECAR(ECARConfig.preset("digits")).eval()
    sample(tiny, zero, seeds=zero, steps=3)  # libraries, thread pools
    before, model = reset_peak(), models.random_model(config)
    ecar_kernels.accelerate(model, keep_weights=False)
    reset_peak()
    sample(model, zero, seeds=zero, steps=PAPER)
    found = {"weights": weight_bytes(model), "needed": needed(config, PAPER)}
    return {"size": size, **found, "peak": resident("VmHWM") - before}


def training(size: str, batch: int, backend: str) -> dict[str, int]:
    """Peak of two steps with AdamW in this process."""
    with ecar_kernels.use_backend(backend):
        _train(ECARConfig.preset("digits"), 2)
        before = reset_peak()
        weights = _train(ECARConfig.preset(size), batch)
    # standing: weights, gradients, and AdamW's two averages.
    return {"batch": batch, "peak": resident("VmHWM") - before, "standing": 4 * weights}


def _train(config: ECARConfig, batch: int) -> int:
    """Two steps, the first of which makes the optimizer's state; the weights' bytes."""
    model = ECAR(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for _ in range(2):
        latents = torch.randn(batch, *config.latent_shape)
        model.loss(latents, torch.randint(config.num_classes, (batch,))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weight_bytes(model)


def alone(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What the function returns, called in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def render(record: dict[str, Any]) -> str:
    sampled, trained = [], []
    for row in record.get("sampling", []):
        sizes = {"weights": row["weights"], **row["needed"], "peak": row["peak"]}
        sizes["at most"] = row["weights"] + SLACK * sum(row["needed"].values())
        cells = {name.replace("kv_cache", "KV cache"): _mib(size) for name, size in sizes.items()}
        sampled.append({"sampling": row["size"], **cells})
    for row in record.get("training", []):
        eager, ours = row["eager"], row["ours"]
        standing = {"weights, gradients, AdamW": _mib(eager["standing"])}
        peaks = {"eager": _mib(eager["peak"]), "ecar_kernels": _mib(ours["peak"])}
        what = {"training": row["size"], "batch": str(eager["batch"])}
        trained.append({**what, **standing, **peaks, "ratio": times(ours["peak"], eager["peak"])})
    return tables(sampled, trained)


def _mib(size: float) -> str:
    return f"{size / MIB:.1f}"


def training_both(size: str) -> dict[str, Any]:
    """A row of the eager reference and of ecar_kernels."""
    ways = {"eager": "reference", "ours": "auto"}
    return {"size": size} | {way: alone(training, size, BATCH, ways[way]) for way in ways}


CASES: dict[str, Callable[[], dict[str, list]]] = {
    **{f"sampling {s}": lambda s=s: {"sampling": [alone(sampling, s)]} for s in ("S", "B", "L")},
    "training S": lambda: {"training": [training_both("S")]},
}


def main(arguments: Sequence[str] | None = None) -> int:
    if not STATUS.exists():
        raise SystemExit(f"error: memory is read from {STATUS}, which this system does not have")
    how = {"same": operator.itemgetter("size"), "order": ("S", "B", "L"), "arguments": arguments}
    return commands.main("memory", __doc__, lambda case: case(), CASES, render, **how)


if __name__ == "__main__":
    sys.exit(main())

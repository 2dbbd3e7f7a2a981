"""Peak memory of sampling and of a training step, by ecar_kernels and by eager PyTorch.

Each figure comes from a process of its own: its peak resident set (VmHWM of Linux's
/proc/self/status), less what it held before the model was made, libraries loaded and ops run once.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ecar_kernels
from benchmarks import models, results
from benchmarks.models import STEPS
from benchmarks.results import figures, markdown
from ecar import ECAR, PRESETS, ECARConfig, sample, split_steps
from ecar.cli.parser import step_list
from ecar.sampling.guidance import PAPER_STEPS, Steps

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SETTLED = 5  # steps of a stage after which nothing may grow
SLACK = 1.5  # a peak of sampling is at most the weights + 1.5x what sampling needs
TRAINING = 0.75  # a training step's, of the eager reference's
MIB = 2**20


def resident(field: str = "VmRSS") -> int:
    """Bytes resident now, or with "VmHWM" at most since `reset_peak`."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def reset_peak() -> None:
    """Gives back what is free, and lets the peak begin at what is resident."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def needed(config: ECARConfig, steps: Steps, itemsize: int = 4) -> dict[str, int]:
    """Bytes that sampling one image needs besides the weights, at the largest stage.

    modulation: of all tokens, and of all steps. kv_cache: keys and values of all layers.
    activations: what one flow block makes of its tokens: q, k, v, attention's output, the
    stream, the hidden layer, the stream again: 10 [N, C] with an MLP ratio of 4.
    """
    tokens, width = config.stage_tokens[-1], config.width
    rows = tokens + max(split_steps(steps, config.num_stages))
    return {
        "modulation": itemsize * rows * (6 * config.flow_blocks + 2) * width,
        "kv_cache": itemsize * 2 * config.ar_layers * config.num_tokens * width,
        "activations": itemsize * tokens * (6 * width + config.mlp_width),
    }


def kept(model: ECAR, backend: str) -> int:
    """Bytes that the loss of one image keeps for its backward, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            found.setdefault(address, tensor)
        return tensor

    with (
        ecar_kernels.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model.loss(torch.randn(1, *model.config.latent_shape), torch.zeros(1, dtype=torch.int64))
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def sampling(config: ECARConfig, steps: Steps) -> dict[str, Any]:
    """Peak and growth of one image in this process; weights are packed in place."""
    _draw(ECAR(ECARConfig.preset("digits")).eval(), 3)  # libraries, thread pools
    reset_peak()
    before = resident()
    model = models.random_model(config)
    ecar_kernels.accelerate(model, keep_weights=False)
    making = resident("VmHWM") - before
    reset_peak()
    seen: list[tuple[int, int]] = []
    _draw(model, steps, lambda info: seen.append((info.stage, resident())))
    first = resident("VmHWM") - before
    _draw(model, steps)
    growth = []
    for stage in range(1, config.num_stages + 1):
        of = [size for at, size in seen if at == stage][SETTLED:]
        growth.append(of[-1] - of[0] if of else 0)
    return {
        "weights": weight_bytes(model),
        "needed": needed(config, steps),
        "steps": sum(split_steps(steps, config.num_stages)),
        "peak": first,
        "second_image": resident("VmHWM") - before,
        "peak_of_making": making,
        "growth_of_stages": growth,
    }


def _draw(model: ECAR, steps: Steps, callback: Callable[[Any], object] | None = None) -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    sample(model, zero, seeds=zero, steps=steps, callback=callback)


def training(config: ECARConfig, batch: int) -> dict[str, Any]:
    """Peak of two steps with AdamW in this process, on the backend in force."""
    _train(ECARConfig.preset("digits"), 2)
    reset_peak()
    before = resident()
    weights = _train(config, batch)
    # standing: weights, gradients, and AdamW's two averages.
    return {"batch": batch, "peak": resident("VmHWM") - before, "standing": 4 * weights}


def _train(config: ECARConfig, batch: int) -> int:
    """Two steps, the first of which makes the optimizer's state; the weights' bytes."""
    model = ECAR(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for _ in range(2):
        latents = torch.randn(batch, *config.latent_shape)
        labels = torch.randint(config.num_classes, (batch,))
        model.loss(latents, labels).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weight_bytes(model)


def in_fresh_process(
    kind: str, size: str, *, backend: str = "auto", steps: Steps = STEPS, batch: int = 1
) -> dict[str, Any]:
    """`sampling` or `training` of a preset, in a process of its own."""
    given = f"--child {kind} --sizes {size} --backend {backend} --steps {steps} --batch {batch}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *given.split()],
        cwd=results.ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{kind} of {size} on {backend} failed:\n{done.stderr}")
    return {"size": size, **json.loads(done.stdout.splitlines()[-1])}


def render(record: dict[str, Any]) -> str:
    sampled = markdown(
        ("sampling", "weights", "modulation", "KV cache", "activations", "peak", "at most"),
        [
            (
                row["size"],
                *map(_mib, (row["weights"], *row["needed"].values(), row["peak"])),
                _mib(row["weights"] + SLACK * sum(row["needed"].values())),
            )
            for row in record["sampling"]
        ],
    )
    trained = markdown(
        ("training", "batch", "weights, gradients, AdamW", "eager", "ecar_kernels", "ratio"),
        [
            (
                row["size"],
                str(row["eager"]["batch"]),
                *map(_mib, (row["eager"]["standing"], row["eager"]["peak"], row["ours"]["peak"])),
                f"{figures(row['ours']['peak'] / row['eager']['peak'])}x",
            )
            for row in record["training"]
        ],
    )
    steps = record["sampling"][0]["steps"] if record["sampling"] else PAPER_STEPS
    return (
        f"{sampled}\n\n{trained}\n\nMiB, float32; peak resident set of a fresh process, less what "
        f"it held before the model was made.\nSampling: one image of {steps} steps without "
        f"guidance, weights packed in place; at most: weights + {SLACK}x the next three columns."
        f"\nTraining: two steps with AdamW; the target is {TRAINING}x eager."
    )


def _mib(size: float) -> str:
    return f"{size / MIB:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = results.parser("memory", __doc__)
    parser.add_argument(
        "--sizes", nargs="+", choices=PRESETS, default=("S", "B", "L"), help="that sample"
    )
    parser.add_argument(
        "--training", nargs="*", choices=PRESETS, default=("S",), help="that train (default: S)"
    )
    parser.add_argument("--batch", type=int, default=16, help="of training (default: 16)")
    parser.add_argument("--steps", type=step_list, default=STEPS, help="default: %(default)s")
    parser.add_argument("--child", choices=("sampling", "training"), help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="auto", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not STATUS.exists():
        raise SystemExit(f"error: memory is read from {STATUS}, which this system does not have")
    if options.child is not None:
        config = ECARConfig.preset(options.sizes[0])
        with ecar_kernels.use_backend(options.backend):
            found = (
                sampling(config, options.steps)
                if options.child == "sampling"
                else training(config, options.batch)
            )
        print(json.dumps(found))
        return
    facts = results.describe()
    sampled = [in_fresh_process("sampling", size, steps=options.steps) for size in options.sizes]
    trained = [
        {"size": size}
        | {
            name: in_fresh_process("training", size, backend=backend, batch=options.batch)
            for name, backend in (("eager", "reference"), ("ours", "auto"))
        }
        for size in options.training
    ]
    results.finish(options.results, "memory", facts, render, sampling=sampled, training=trained)


if __name__ == "__main__":
    main()

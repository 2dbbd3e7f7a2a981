"""`python -m benchmarks.memory`: peak memory of sampling, and of a training step, ours and eager.

Each figure comes from a process of its own: its peak resident set (VmHWM of Linux's
/proc/self/status), less what it held before the model was made, libraries loaded and ops run once.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ecar_kernels
from benchmarks import environment, models, results
from benchmarks.models import STEPS
from benchmarks.results import figures, markdown
from ecar.config import PRESETS, ECARConfig
from ecar.model import ECAR
from ecar.sampling import StepInfo, sample, split_steps

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SETTLED = 5  # steps of a stage after which nothing may grow
SLACK = 1.5  # section 7 of the design: peak <= weights + 1.5x what sampling needs
TRAINING = 0.75  # likewise: of the eager reference's peak, at most
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


def needed(config: ECARConfig, steps: int, itemsize: int = 4) -> dict[str, int]:
    """Bytes that sampling one image needs beside the weights, at the largest stage.

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


def sampling(config: ECARConfig, steps: int) -> dict[str, Any]:
    """Peak and growth of one image in this process; weights are packed in place."""
    _draw(ECAR(ECARConfig.preset("digits")).eval(), 3)  # libraries, thread pools
    reset_peak()
    before = resident()
    model = models.random_model(config)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ecar_kernels.accelerate(model, keep_weights=False)
    making = resident("VmHWM") - before
    reset_peak()
    held = resident() - before
    seen: list[tuple[int, int]] = []
    _draw(model, steps, lambda info: seen.append((info.stage, resident())))
    first = resident("VmHWM") - before
    _draw(model, steps)
    growth = []
    for stage in range(1, config.num_stages + 1):
        of = [size for at, size in seen if at == stage][SETTLED:]
        growth.append(of[-1] - of[0] if of else 0)
    return {
        "weights": weights,
        "needed": needed(config, steps),
        "steps": steps,
        "peak": first,
        "second_image": resident("VmHWM") - before,
        "after_making": held,
        "peak_of_making": making,
        "growth_of_stages": growth,
    }


def _draw(model: ECAR, steps: int, note: Any = None) -> None:
    def callback(info: StepInfo) -> None:
        if note is not None:
            note(info)

    sample(
        model,
        torch.zeros(1, dtype=torch.int64),
        seeds=torch.zeros(1, dtype=torch.int64),
        steps=steps,
        callback=callback,
    )


def training(config: ECARConfig, batch: int) -> dict[str, Any]:
    """Peak of two steps with AdamW in this process, on the backend in force."""
    _train(ECARConfig.preset("digits"), 2)
    reset_peak()
    before = resident()
    weights = _train(config, batch)
    return {
        "batch": batch,
        "peak": resident("VmHWM") - before,
        # Weights, gradients, and AdamW's two averages.
        "standing": 4 * weights,
    }


def _train(config: ECARConfig, batch: int) -> int:
    """Two steps: the first makes the optimizer's state. Bytes of the weights."""
    model = ECAR(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for _ in range(2):
        latents = torch.randn(batch, *config.latent_shape)
        labels = torch.randint(config.num_classes, (batch,))
        model.loss(latents, labels).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return sum(p.numel() * p.element_size() for p in model.parameters())


def in_fresh_process(
    kind: str, size: str, *, backend: str = "auto", steps: int = STEPS, batch: int = 1
) -> dict[str, Any]:
    """`sampling` or `training` of a preset, each in a process of its own."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.memory",
            "--child",
            kind,
            "--sizes",
            size,
            "--backend",
            backend,
            "--steps",
            str(steps),
            "--batch",
            str(batch),
        ],
        cwd=results.ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{kind} of {size} on {backend} failed:\n{done.stderr}")
    return {"size": size, **json.loads(done.stdout.splitlines()[-1])}


def render(record: dict[str, Any]) -> str:
    rows = []
    for row in record["sampling"]:
        wanted = row["weights"] + SLACK * sum(row["needed"].values())
        rows.append(
            (
                row["size"],
                *map(_mib, (row["weights"], *row["needed"].values(), row["peak"], wanted)),
                _mark(row["peak"] <= wanted),
                _mib(row["second_image"] - row["peak"]),
                " / ".join(map(_mib, row["growth_of_stages"])),
                _mib(row["peak_of_making"]),
            )
        )
    sampled = markdown(
        (
            "sampling",
            "weights",
            "modulation",
            "KV cache",
            "activations",
            "peak",
            "wanted <=",
            "",
            "a second image adds",
            "growth in each stage",
            "peak of making the model",
        ),
        rows,
    )
    rows = []
    for row in record["training"]:
        eager, ours = row["eager"], row["ours"]
        ratio = ours["peak"] / eager["peak"]
        rows.append(
            (
                row["size"],
                str(eager["batch"]),
                _mib(eager["standing"]),
                _mib(eager["peak"]),
                _mib(ours["peak"]),
                f"{figures(ratio)}x",
                f"{TRAINING}x",
                _mark(ratio <= TRAINING),
            )
        )
    trained = markdown(
        ("training step", "batch", "standing", "eager", "ours", "ours / eager", "wanted <=", ""),
        rows,
    )
    return (
        f"{sampled}\n\n{trained}\n\nMiB, float32; peak resident set of a fresh process, less "
        "what it held before the model was made.\nSampling: one image of "
        f"{record['sampling'][0]['steps']} steps without guidance, weights packed in place; "
        f"wanted is weights + {SLACK}x the three columns beside.\nTraining: two steps with "
        "AdamW; standing is weights, gradients and AdamW's state, held by both."
    )


def _mark(met: bool) -> str:
    return "met" if met else "MISSED"


def _mib(size: float) -> str:
    return f"{size / MIB:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--sizes", nargs="+", choices=PRESETS, default=("S", "B", "L"), help="that sample"
    )
    parser.add_argument(
        "--training", nargs="*", choices=PRESETS, default=("S",), help="that train (default: S)"
    )
    parser.add_argument("--batch", type=int, default=16, help="of training (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--results",
        type=Path,
        default=results.FOLDER,
        help="folder to write <device>/memory.json into",
    )
    parser.add_argument("--child", choices=("sampling", "training"), help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="auto", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not STATUS.exists():
        raise SystemExit(f"error: memory is read from {STATUS}, which this system has not")
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
    facts = environment.describe()
    sampled = [in_fresh_process("sampling", size, steps=options.steps) for size in options.sizes]
    trained = [
        {
            "size": size,
            **{
                name: in_fresh_process("training", size, backend=backend, batch=options.batch)
                for name, backend in (("eager", "reference"), ("ours", "auto"))
            },
        }
        for size in options.training
    ]
    file = results.path("memory", options.results)
    record = {"sampling": sampled, "training": trained}
    results.write(file, "memory", facts, **record)
    print(f"{render(record)}\n\n{results.where(facts)}\n\nwrote {file}")


if __name__ == "__main__":
    main()

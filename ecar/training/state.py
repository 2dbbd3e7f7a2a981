"""The state file, from which a training goes on bit for bit, and the checkpoints that are kept.

One safetensors file. Tensors: ``model/*`` raw weights, ``ema/*`` their average, ``ema_0.999/*`` a
further one, ``adamw/first/*`` and ``adamw/second/*`` moments, ``adamw/step``, ``gradnorm/*`` or
``uncertainty/*``, and ``history``, the steps not yet in the log. Metadata: format, version, step,
seconds, both configurations as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ecar.checkpoint import PIPELINE_FILE, VAE_FOLDER
from ecar.files import atomic_folder, link, read_tensors, require_finite, write_tensors
from ecar.model import ECAR
from ecar.training.config import FREE_ON_RESUME, TrainConfig

__all__ = [
    "check_same_training",
    "check_tensors",
    "keep_checkpoint",
    "prune",
    "read_header",
    "read_state",
    "state_path",
    "write_state",
]

_SCHEDULE = ("steps", "schedule", "decay_steps", "warmup_steps")
FORMAT = "ecar training state"
VERSION = "1"


def state_path(output_dir: str | os.PathLike[str]) -> Path:
    return Path(output_dir) / "state" / "state.safetensors"


def write_state(
    path: Path, tensors: dict[str, Tensor], config: TrainConfig, header: dict[str, Any]
) -> None:
    """Write the state, whole or not at all.

    Args:
        header: step, seconds, interval (seconds since the last log row), scaler (fp16's), as
            JSON in the metadata.

    Raises:
        ValueError: naming the tensor, where one is not finite; nothing is written then.
    """
    _require_finite(path, tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(
        path,
        tensors,
        {
            "format": FORMAT,
            "version": VERSION,
            "train": json.dumps(config.to_dict()),
            "header": json.dumps(header),
        },
    )


def read_header(path: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration and the small values of a state file, without its tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the path: cut short, not safetensors, not a training state.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, so there is no training to resume")
    try:
        # Not "pt", which opens the path a second time to map it: a training that is still at work
        # may have put another state in its place in between.
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or cut short ({error})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not a training state, its format is {metadata.get('format')!r}")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path}: expected state version {VERSION}, got {metadata.get('version')!r}"
        )
    try:
        config, header = (json.loads(metadata[name]) for name in ("train", "header"))
        for name in ("step", "seconds", "interval", "scaler"):
            if name not in header:
                raise ValueError(f"{name!r} is missing")
        return TrainConfig.from_dict(config), header
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged metadata ({error})") from None


def check_same_training(path: Path, saved: TrainConfig, wanted: TrainConfig, step: int) -> None:
    """ValueError naming the path and the first field in which the two differ.

    Fields that decide no weight may differ, and those of the learning rate's schedule where all
    steps so far would have had the same rate.
    """
    model, other = saved.model.to_dict(), wanted.model.to_dict()
    for name, value in other.items():
        if model[name] != value:
            raise ValueError(
                f"{path}: of another configuration: model {name!r} is {model[name]!r} there, "
                f"{value!r} here"
            )
    before, after = saved.to_dict(), wanted.to_dict()
    done = range(min(step, wanted.steps))
    same_rates = all(saved.learning_rate_at(i) == wanted.learning_rate_at(i) for i in done)
    for name, value in after.items():
        if name in FREE_ON_RESUME or before[name] == value or (name in _SCHEDULE and same_rates):
            continue
        hint = " (the learning rates of the steps so far would differ)" if name in _SCHEDULE else ""
        raise ValueError(
            f"{path}: of another configuration: {name!r} is {before[name]!r} there, "
            f"{value!r} here{hint}"
        )
    if wanted.steps < step:
        raise ValueError(f"{path}: already at step {step}, past steps {wanted.steps}")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors, on the CPU. Raises as ``read_header`` does."""
    tensors, _ = read_tensors(path)
    _require_finite(path, tensors)
    return tensors


def _require_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    # The history may hold gradient norms that overflowed fp16 and whose steps were skipped.
    require_finite(path, {name: t for name, t in tensors.items() if name != "history"})


def check_tensors(path: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """ValueError naming the path and the tensor, where names, shapes or dtypes disagree."""
    for kind, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has the unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"{path}: of another configuration: {kind} tensor {min(names)!r}")
    for name, tensor in expected.items():
        if name == "history":
            continue  # as many rows as steps since the last log row
        got = tensors[name]
        if got.shape != tensor.shape or got.dtype != tensor.dtype:
            raise ValueError(
                f"{path}: of another configuration: tensor {name!r} is {got.dtype} "
                f"{list(got.shape)}, expected {tensor.dtype} {list(tensor.shape)}"
            )


def keep_checkpoint(model: ECAR, output: Path, name: str) -> None:
    """Write a checkpoint into ``output``/``name``, with the pipeline's settings of ``output``."""
    with atomic_folder(output / name) as scratch:
        model.save_pretrained(scratch)
        if (output / PIPELINE_FILE).exists():
            shutil.copy(output / PIPELINE_FILE, scratch)
        if (output / VAE_FOLDER).exists():
            shutil.copytree(output / VAE_FOLDER, scratch / VAE_FOLDER, copy_function=link)


def prune(output: Path, kept: int) -> None:
    """Remove all but the last ``kept`` of the checkpoints ``step_*`` in ``output``/checkpoints."""
    folders = sorted((output / "checkpoints").glob("step_*"))
    for folder in folders[: max(len(folders) - kept, 0)]:
        shutil.rmtree(folder)


def adamw_tensors(optimizer: torch.optim.AdamW, names: list[str]) -> dict[str, Tensor]:
    """AdamW's moments by parameter name, and its step, one for all; zeros before the first."""
    parameters = optimizer.param_groups[0]["params"]
    tensors = {}
    step = torch.zeros(())
    for name, parameter in zip(names, parameters, strict=True):
        state = optimizer.state.get(parameter)
        if state:
            step = state["step"]
        for key, moment in (("first", "exp_avg"), ("second", "exp_avg_sq")):
            tensors[f"adamw/{key}/{name}"] = state[moment] if state else torch.zeros_like(parameter)
    return {**tensors, "adamw/step": step}


def load_adamw(optimizer: torch.optim.AdamW, names: list[str], tensors: dict[str, Tensor]) -> None:
    """The inverse of ``adamw_tensors``."""
    step = tensors["adamw/step"]
    if step == 0:
        return
    optimizer.load_state_dict(
        {
            "param_groups": optimizer.state_dict()["param_groups"],
            "state": {
                index: {
                    "step": step.clone(),
                    "exp_avg": tensors[f"adamw/first/{name}"].clone(),
                    "exp_avg_sq": tensors[f"adamw/second/{name}"].clone(),
                }
                for index, name in enumerate(names)
            },
        }
    )

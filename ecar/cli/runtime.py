"""What commands do alike once torch is there: settings, devices, backends."""

from __future__ import annotations

import argparse
import contextlib
import os
from contextlib import AbstractContextManager
from typing import Any

import torch

from ecar.cli.parser import UsageError
from ecar.config import ECARConfig
from ecar.data.load import IN_FILES, find_dataset
from ecar.hub import recommended_dtype
from ecar.info import backends_in_use
from ecar_kernels import use_backend

__all__ = [
    "SETTINGS",
    "chosen_backend",
    "chosen_data",
    "chosen_device",
    "chosen_dtype",
    "chosen_settings",
    "describe_backends",
    "own_device",
    "process_share",
]

# The pipeline's settings and the arguments that give them.
SETTINGS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "guidance_schedule": "guidance_schedule",
    "guidance_interval": "guidance_interval",
    "solver": "solver",
    "grid": "grid",
}


def chosen_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that were given."""
    values = {name: getattr(arguments, flag, None) for name, flag in SETTINGS.items()}
    return {name: value for name, value in values.items() if value is not None}


def chosen_device(name: str) -> torch.device:
    """The device, if there is one here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"--device: cannot use {name!r} here ({reason})") from None
    if device.type == "meta":
        raise UsageError("--device: 'meta' holds no values")
    return device


def chosen_data(dataset: str, root: str | None) -> tuple[str, str | None]:
    """The data set's name and where it lies, which --dataset may name itself."""
    if root is None and dataset in IN_FILES and os.path.isdir(dataset):
        dataset = f"{dataset}{os.sep}"  # a folder of that name, such as latents
    name, place = find_dataset(dataset)
    if place is not None and root is not None:
        raise UsageError(f"--data-root: --dataset {dataset} says where the data lies")
    return name, place or root


def process_share() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun and accelerate tell them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own_device(name: str) -> torch.device:
    """As `chosen_device`, but of several processes on one machine each has a GPU of its own."""
    device = chosen_device(name)
    if device.type == "cuda" and device.index is None:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", local % torch.cuda.device_count())
    return device


def chosen_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of --dtype; auto by the backend in force."""
    return recommended_dtype(device) if name == "auto" else getattr(torch, name)


def chosen_backend(name: str | None) -> AbstractContextManager[Any]:
    """A block in which that backend serves; None changes nothing."""
    return contextlib.nullcontext() if name is None else use_backend(name)


def describe_backends(config: ECARConfig, device: torch.device, dtype: torch.dtype) -> str:
    """ "cpp (stage_attention), reference (adaln_linear, ..)".

    Raises:
        BackendUnavailableError: the backend asked for cannot serve an op.
    """
    ops_of: dict[str, list[str]] = {}
    for op, backend in backends_in_use(config, device, dtype).items():
        ops_of.setdefault(backend, []).append(op)
    return ", ".join(f"{backend} ({', '.join(ops)})" for backend, ops in ops_of.items())

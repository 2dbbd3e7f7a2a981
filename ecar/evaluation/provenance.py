"""What a reported number was made with: code, versions, weights, device."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

__all__ = ["cpu_name", "describe_device", "device_name", "versions"]


def device_name(device: torch.device) -> str:
    """Such as "cuda:0 (NVIDIA H100)" or "cpu: AMD EPYC (family 25, model 17)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device}: {cpu_name()}"


def describe_device(device: torch.device) -> str:
    """Such as "cuda:0", or "cpu with 2 threads"."""
    count = torch.get_num_threads()
    return str(device) if device.type != "cpu" else f"cpu with {count} thread{'s'[: count > 1]}"


def cpu_name() -> str:
    """The processor's marketing name with its family and model, or its architecture.

    On virtual machines the name alone is often the same for several generations ("AMD EPYC").
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+?)\s*$", text, re.MULTILINE))
    name = found.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= found.keys():
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name


def versions() -> dict[str, str | None]:
    """Versions of Python and the packages that take part, and this source's commit."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("ecar", "torch", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["ecar_commit"] = _commit()
    return found


def _commit() -> str | None:
    """The source's git commit, with -dirty if it was changed; None outside a repository."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None

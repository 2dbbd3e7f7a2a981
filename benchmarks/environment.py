"""What a timing needs beside it to mean anything: device, threads, versions, load, date."""

import ctypes
import datetime
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "diffusers",
    "pytest-benchmark",
    "flash-attn",
    "xformers",
    "liger-kernel",
    "flashinfer-python",
)
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ASSUMED_CACHE = 32 * 2**20
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def cpu_name() -> str:
    """The processor's marketing name, or its architecture where the system does not say.

    With its family and model, where it has them: on virtual machines the name is often the same
    for several generations ("AMD EPYC"), of which one may be twice as fast.
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


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_level_cache() -> int:
    """Bytes of the largest cache; ASSUMED_CACHE where the system does not say."""
    units = {"K": 2**10, "M": 2**20}
    try:
        texts = [file.read_text().strip() for file in CACHES.glob("index*/size")]
    except OSError:
        texts = []
    sizes = [int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units]
    return max(sizes, default=ASSUMED_CACHE)


def keep_memory() -> bool:
    """Has the C library keep what is freed, so that large results are not mapped anew each time.

    glibc maps every allocation above 32 MiB and unmaps it when freed: a result of 64 MiB would be
    timed with its page faults, which cost several times the kernel. False where it is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def slug(text: str) -> str:
    """A folder's name for a device: lower case, words joined by hyphens."""
    plain = re.sub(r"\((r|tm)\)", "", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def describe() -> dict[str, Any]:
    """Everything that is recorded beside the timings; no host or user names."""
    return {
        "device": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        # Of the whole machine over the last minute: near 0 on one that does nothing else.
        "load_before": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }

"""Results: the machine they are of, the files they are in, and tables of them."""

import argparse
import ctypes
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ecar.evaluation.provenance import cpu_name

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "numpy", "diffusers", "flash-attn", "xformers")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ASSUMED_CACHE = 32 * 2**20
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def last_level_cache() -> int:
    """Bytes of the largest cache; ASSUMED_CACHE if the system does not report one."""
    units = {"K": 2**10, "M": 2**20}
    try:
        texts = [file.read_text().strip() for file in CACHES.glob("index*/size")]
    except OSError:
        texts = []
    sizes = [int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units]
    return max(sizes, default=ASSUMED_CACHE)


def keep_memory() -> bool:
    """Has glibc keep freed memory instead of unmapping it; False on another C library.

    Every allocation above 32 MiB is mapped and unmapped otherwise: a result of 64 MiB would be
    timed with its page faults, which cost several times the kernel.
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


def describe() -> dict[str, Any]:
    """What is recorded with every timing: device, threads, versions, load, date; no host names."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    return {
        "device": cpu_name(),
        "cores": len(cores),
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


def commit() -> dict[str, Any]:
    """The checked-out commit, and whether files differ from it; None where there is no git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"id": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def slug(text: str) -> str:
    """A folder's name for a device: lower case, words joined by hyphens."""
    plain = re.sub(r"\((r|tm)\)", "", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def path(name: str, folder: Path = FOLDER) -> Path:
    """The file of a result on this machine: FOLDER/<device>/<name>.json."""
    return folder / slug(cpu_name()) / f"{name}.json"


def write(file: Path, kind: str, facts: dict[str, Any], **content: Any) -> None:
    """Writes a result. kind: one of `report.KINDS`; facts: `describe()` from before the run."""
    save(file, {"kind": kind, "environment": facts, "commit": commit(), **content})


def save(file: Path, record: dict[str, Any]) -> None:
    """Writes a record, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(dumps(record) + "\n", encoding="utf-8")
    partial.replace(file)


def dumps(value: Any, indent: str = "") -> str:
    """JSON with a line for each object of a list and each member of a large or outer object."""
    inner = indent + " "
    if isinstance(value, dict) and (not indent or _is_expanded(value)):
        parts = [f"{inner}{json.dumps(name)}: {dumps(v, inner)}" for name, v in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}" if parts else "{}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(inner + json.dumps(v) for v in value) + f"\n{indent}]"
    return json.dumps(value)


def _is_expanded(value: Any) -> bool:
    if isinstance(value, dict):
        return len(value) > 20 or any(map(_is_expanded, value.values()))
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def read(file: Path) -> dict[str, Any]:
    """A record that `save` wrote; ValueError, naming the file, for anything else."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: expected a result as JSON, got {error}") from None
    if (
        not isinstance(record, dict)
        or "kind" not in record
        or not {"environment", "runs"} & record.keys()
    ):
        raise ValueError(f"{file}: expected a result with 'kind' and 'environment' or 'runs'")
    return record


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """Of `python -m benchmarks.NAME`, described by its docstring, with --results."""
    found = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=" ".join(doc.partition("\n\n")[0].split())
    )
    found.add_argument(
        "--results", type=Path, default=FOLDER, metavar="FOLDER",
        help="write FOLDER/<device>/*.json (default: benchmarks/results)",
    )  # fmt: skip
    return found


def finish(
    folder: Path,
    kind: str,
    facts: dict[str, Any],
    render: Callable[[dict], str],
    *,
    of: str | None = None,
    **content: Any,
) -> None:
    """Writes a result and prints its table. of: what it is of, where there are several files."""
    file = path(kind if of is None else f"{kind}-{of}", folder)
    write(file, kind, facts, **content)
    print(f"{render(content)}\n\n{where(facts)}\n\nwrote {file}")


def where(facts: dict[str, Any]) -> str:
    """A run's environment in a line."""
    versions = ", ".join(
        f"{name} {version}" for name, version in facts["versions"].items() if version is not None
    )
    return (
        f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"{facts['cpu_capability']}; {versions}; {facts['date']}; load before "
        f"{facts['load_before']}"
    )


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in plain text, too."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        return f"| {' | '.join([row[0].ljust(widths[0]), *padded[1:]])} |"

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([line(cells[0]), rule.replace(":", "-", 1), *map(line, cells[1:])])


def duration(seconds: float | None) -> str:
    """1.23 us, 45.6 ms, 7.89 s, to three figures."""
    if seconds is None:
        return "-"
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{figures(seconds * factor)} {unit}"
    return f"{figures(seconds)} s"


def figures(value: float) -> str:
    """Three figures, and all of those before the point."""
    return f"{value:.{max(0, 2 - len(str(int(abs(value)))) + 1)}f}"

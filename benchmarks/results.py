"""Results: the machine they are of, the files they are in, and tables of them."""

import ctypes
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ecar.evaluation import provenance
from ecar.evaluation.provenance import cpu_name
from ecar.files import atomic_path, read_json

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "results"
CPU = torch.device("cpu")
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "diffusers",
    "flash-attn",
    "xformers",
    "openvino",
    "onnxruntime",
    "nncf",
)
Record = dict[str, Any]
Row = dict[str, Any]
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def last_level_cache(device: torch.device = CPU) -> int:
    """Bytes of the largest cache; 32 MiB if the system does not report one."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [int(file.read_text().rstrip("K\n")) for file in CACHES.glob("index*/size")]
    return 1024 * max(sizes, default=32 * 1024)


def keep_memory() -> None:
    """Has glibc keep freed memory instead of unmapping it.

    Every allocation above 32 MiB is mapped and unmapped otherwise: a result of 64 MiB would be
    timed with its page faults, which cost several times the kernel.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device = CPU) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def describe(device: torch.device = CPU) -> dict[str, Any]:
    """What is recorded with every timing; no host names."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    facts = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        facts = {
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": subprocess.getoutput(driver),
        }
    return facts | {
        "device": device_name(device),
        "cores": len(cores),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "commit": provenance.versions()["ecar_commit"],
        # Of the whole machine over the last minute: near 0 on one that does nothing else.
        "load_before": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def where(facts: dict[str, Any]) -> str:
    """A run's environment in a line."""
    versions = ", ".join(f"{name} {v}" for name, v in facts["versions"].items() if v is not None)
    said = (
        f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"{facts['cpu_capability']}; {versions}; {facts['date']}; load before "
        f"{facts['load_before']}"
    )
    if rates := facts.get("rates"):
        copied, gemm = rates["bytes_per_second"], rates["multiply_adds_per_second"]
        said += f"; copy {copied * 1e-9:.1f} GB/s, GEMM {2e-9 * gemm:.0f} GFLOP/s"
    return said


def environments(record: Record) -> str:
    """A line for each run of a record."""
    runs = record["runs"]
    return "\n\n".join(f"Run {i}: " * (len(runs) > 1) + where(its) for i, its in enumerate(runs, 1))


def briefly(facts: dict[str, Any], what: str = "") -> str:
    """Device, threads, what was timed, torch and day."""
    torch_and_day = f"torch {facts['versions']['torch']}, {facts['date'][:10]}"
    return f"{facts['device']}, {facts['threads']} threads, {what}{torch_and_day}"


def slug(text: str) -> str:
    """A folder's name for a device: lower case, words joined by hyphens."""
    plain = re.sub(r"\((r|tm)\)", "", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def path(name: str, folder: Path = FOLDER, device: torch.device = CPU) -> Path:
    """The file of a result on this machine: FOLDER/<device>/<name>.json."""
    return folder / slug(device_name(device)) / f"{name}.json"


def merged(
    record: Record,
    this: dict[str, Any],
    found: Mapping[str, Iterable[Row]],
    same: Callable[[Row], Any],
    order: Sequence[Any] = (),
) -> Record:
    """The record with the rows of a run by list: in the place of those that are the same, or at the
    end; rows that are in `order` as they are there.

    this: `describe()` of the run. Runs that differ in their time and load alone are one.
    """

    def environment(run: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in run.items() if key not in ("date", "load_before")}

    def grouped(rows: Iterable[Row]) -> dict[Any, list[Row]]:
        groups: dict[Any, list[Row]] = {}
        for row in rows:
            groups.setdefault(same(row), []).append(row)
        return groups

    runs = [*record["runs"]]
    known = [environment(run) for run in runs]
    if environment(this) not in known:
        runs.append(this)
        known.append(environment(this))
    number = {"run": known.index(environment(this))}
    places = {key: place for place, key in enumerate(order)}
    lists = rows_of(record)
    for name, rows in found.items():
        groups = grouped(lists.get(name, ())) | grouped(row | number for row in rows)
        keys = sorted(groups, key=lambda key: places.get(key, len(places)))
        lists[name] = [row for key in keys for row in groups[key]]
    used = sorted({row.get("run", 0) for rows in lists.values() for row in rows})
    for name, rows in lists.items():
        lists[name] = [row | {"run": used.index(row.get("run", 0))} for row in rows]
    return record | {"runs": [runs[index] for index in used]} | lists


def rows_of(record: Record) -> dict[str, list[Row]]:
    """A record's lists of rows by name."""
    return {name: its for name, its in record.items() if isinstance(its, list) and name != "runs"}


def merge(
    file: Path,
    kind: str,
    this: dict[str, Any],
    found: Mapping[str, Iterable[Row]],
    same: Callable[[Row], Any],
    order: Sequence[Any] = (),
    **content: Any,
) -> Record:
    """Writes the rows into the file, which need not exist: see `merged`. kind: one of
    `report.KINDS`; content: what else the record says."""
    before = read(file) if file.exists() else {"kind": kind, "runs": []}
    save(file, record := merged(before, this, found, same, order) | content)
    return record


def save(file: Path, record: dict[str, Any]) -> None:
    """Writes a record, whole or not at all."""
    with atomic_path(file) as temporary:
        temporary.write_text(dumps(record) + "\n", "utf-8")


def dumps(value: Any, indent: str = "\n ") -> str:
    """JSON with a line for each member of an object that is in no list, and each item of a list
    of objects."""
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(name)}: {dumps(item, indent + ' ')}" for name, item in value.items()]
        first, last = "{}"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        lines, (first, last) = [json.dumps(item) for item in value], "[]"
    else:
        return json.dumps(value)
    return f"{first}{indent}{f',{indent}'.join(lines)}{indent[:-1]}{last}"


def read(file: Path) -> dict[str, Any]:
    """A record that `save` wrote; ValueError, naming the file, for anything else."""
    record = read_json(file)
    if not isinstance(record, dict) or not {"kind", "runs"} <= record.keys():
        raise ValueError(f"{file}: expected a result with 'kind' and 'runs'")
    return record


def tables(*lists: Sequence[Mapping[str, str]]) -> str:
    """The Markdown tables of those that have rows."""
    return "\n\n".join(table(rows) for rows in lists if rows)


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of rows that are cells by column; "-" where a row has none."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return markdown(columns, [[row.get(name, "-") for name in columns] for row in rows])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in plain text, too."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        return f"| {' | '.join([row[0].ljust(widths[0]), *padded[1:]])} |"

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([line(cells[0]), rule.replace(":", "-", 1), *map(line, cells[1:])])


def medians(row: Mapping[str, Any]) -> dict[str, float]:
    """Of each way's seconds in a row."""
    return {way: found["median"] for way, found in row["seconds"].items()}


def duration(seconds: float | None) -> str:
    """1.23 us, 45.6 ms, 7.89 s, to three figures."""
    if seconds is None:
        return "-"
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{figures(seconds * factor)} {unit}"
    return f"{figures(seconds)} s"


def times(value: float | None, base: float = 1.0) -> str:
    """A ratio such as 2.31x, to three figures."""
    return "-" if value is None else f"{figures(value / base)}x"


def figures(value: float) -> str:
    """Three figures, and all of those before the point."""
    return f"{value:.{max(0, 3 - len(str(int(abs(value)))))}f}"

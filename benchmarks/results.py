"""Results: the machine they are of, the files they are in, and tables of them."""

import argparse
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
    return (
        f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"{facts['cpu_capability']}; {versions}; {facts['date']}; load before "
        f"{facts['load_before']}"
    )


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


def write(file: Path, kind: str, facts: dict[str, Any], **content: Any) -> None:
    """Writes a result. kind: one of `report.KINDS`; facts: `describe()` from before the run."""
    save(file, {"kind": kind, "environment": facts, **content})


def merged(
    record: dict[str, Any],
    this: dict[str, Any],
    rows: Iterable[dict[str, Any]],
    case_of: Callable[[dict[str, Any]], Any],
) -> dict[str, Any]:
    """The record with the rows of a run: in the place of those of the same case, or at the end.

    this: `describe()` of the run. Runs that differ in their time and load alone are one.
    """

    def environment(run: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in run.items() if key not in ("date", "load_before")}

    runs = list(record["runs"])
    known = [environment(run) for run in runs]
    if environment(this) not in known:
        runs.append(this)
        known.append(environment(this))
    found = {case_of(row): row for row in record["rows"]}
    found |= {case_of(row): row | {"run": known.index(environment(this))} for row in rows}
    used = sorted({row["run"] for row in found.values()})
    return {
        "kind": record["kind"],
        "runs": [runs[index] for index in used],
        "rows": [row | {"run": used.index(row["run"])} for row in found.values()],
    }


def merge(
    file: Path,
    kind: str,
    this: dict[str, Any],
    row: dict[str, Any],
    case_of: Callable[[dict[str, Any]], Any],
) -> dict[str, Any]:
    """The record of the file, which need not exist, with the row: see `merged`."""
    before = read(file) if file.exists() else {"kind": kind, "runs": [], "rows": []}
    save(file, record := merged(before, this, [row], case_of))
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
    known = isinstance(record, dict) and "kind" in record
    if not known or not {"environment", "runs"} & record.keys():
        raise ValueError(f"{file}: expected a result with 'kind' and 'environment' or 'runs'")
    return record


def parser(
    name: str, doc: str, *, writes: bool = True, seconds: float | None = None
) -> argparse.ArgumentParser:
    """Of `python -m benchmarks.NAME`, described by its docstring's first paragraph.

    writes: with --results. seconds: of a row, where rows can be chosen, with `chosen`.
    """
    found = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}".rstrip("."), description=doc.partition("\n\n")[0]
    )
    add = found.add_argument
    if writes:
        add("--results", type=Path, default=FOLDER, metavar="FOLDER",
            help="write FOLDER/<device>/*.json (default: benchmarks/results)")  # fmt: skip
    if seconds is not None:
        add("-k", nargs="+", default=[], dest="words", metavar="WORD",
            help="only rows whose names contain all of these words")  # fmt: skip
        add("--list", action="store_true", help="print the rows' names and exit")
        add("--seconds", type=float, default=seconds, help=f"for each row (default: {seconds:g})")
    return found


def chosen(
    command: argparse.ArgumentParser, options: argparse.Namespace, names: Iterable[str]
) -> list[str]:
    """The names of the rows to measure: none with --list, which prints them."""
    found = [name for name in names if all(word in name for word in options.words)]
    if not found:
        command.error(f"argument -k: no row's name contains all of {', '.join(options.words)}")
    if options.list:
        print("\n".join(found))
    return [] if options.list else found


def finish(
    file: Path, kind: str, facts: dict[str, Any], render: Callable[[dict], str], **content: Any
) -> None:
    """Writes a result and prints its table."""
    write(file, kind, facts, **content)
    print(f"{render(content)}\n\n{where(facts)}\n\nwrote {file}")


def check_counts(
    file: Path,
    doc: str,
    count: Callable[[], dict],
    compare: Callable[[dict, dict], list[str] | None],
    render: Callable[[dict], str],
    arguments: Sequence[str] | None = None,
) -> int:
    """The command of counts that are committed; its status is 1 if `compare` complains."""
    command = parser(file.stem, doc, writes=False)
    command.add_argument("--update", action="store_true", help=f"write {file.name}")
    options, found = command.parse_args(arguments), count()
    print(render(found))
    if options.update:
        save(file, found)
        print(f"\nwrote {file}")
        return 0
    if not file.exists():
        print(f"\nnot compared: there is no {file}")
        return 0
    complaints = compare(found, read_json(file))
    if complaints is not None:
        print("", *complaints or ["no count is above the committed one"], sep="\n")
    return int(bool(complaints))


def risen(found: Mapping[str, int], committed: Mapping[str, int], share: float = 0.0) -> list[str]:
    """A line for each count that is above the committed one by more than a share of it, or new."""
    return [
        f"{name}: {count:,}, {f'{committed[name]:,} committed' if name in committed else 'new'}"
        for name, count in found.items()
        if name not in committed or count > committed[name] * (1 + share)
    ]


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


def command(
    kind: str,
    doc: str,
    names: Sequence[str],
    measure: Callable[[str, float], dict[str, Any]],
    render: Callable[[dict[str, Any]], str],
) -> int:
    """The command line of a benchmark with rows by name, each written when it is measured."""
    command_line = parser(kind, doc, seconds=15)
    options = command_line.parse_args()
    file, facts = path(kind, options.results), describe()
    rows = {row["name"]: row for row in read(file)["rows"]} if file.exists() else {}
    found = chosen(command_line, options, names)
    for name in found:
        rows[name] = measure(name, options.seconds)
        write(file, kind, facts, rows=[rows[name] for name in names if name in rows])
        print(render({"rows": [rows[name]]}), flush=True)
    if found:
        print(f"merged into {file}")
    return 0

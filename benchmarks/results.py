"""Where results lie, and what is in every file of them."""

import json
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "results"


def path(name: str, folder: Path = FOLDER) -> Path:
    """The file of a result on this machine: FOLDER/<device>/<name>.json."""
    return folder / environment.slug(environment.cpu_name()) / f"{name}.json"


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


def write(file: Path, kind: str, facts: dict[str, Any], **content: Any) -> None:
    """A result as JSON: `facts` are `environment.describe()` as it was before the run.

    kind: which table `benchmarks.table` makes of it.
    """
    save(file, {"kind": kind, "environment": facts, "commit": commit(), **content})


def save(file: Path, record: dict[str, Any]) -> None:
    """A record, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def read(file: Path) -> dict[str, Any]:
    """A record that `write` wrote; ValueError, naming the file, for anything else."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: expected a result as JSON, got {error}") from None
    if not isinstance(record, dict) or not {"kind", "environment"} <= record.keys():
        raise ValueError(f"{file}: expected a result with 'kind' and 'environment'")
    return record


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
    lines = [
        "| "
        + " | ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in cells
    ]
    rule = (
        "|"
        + "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths))
        + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]])


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

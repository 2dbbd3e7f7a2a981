"""What a part of a command is given, the rows that it leaves, and the programs that it runs."""

import math
import operator
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.results import ROOT, duration, table
from ecar import ECARConfig

TINY = ECARConfig(stage_sides=(4, 8), num_classes=10, width=32, heads=2, ar_layers=2, flow_blocks=2)
TAIL = 2000  # characters kept of what failed
HIDDEN = ("part", "output", "served", "run")
PLACE = operator.itemgetter("part", "name")


@dataclass
class Work:
    """A command's settings and rows.

    file: the record, which has a row when it is printed; None: rows are here alone. deadline: of
    the part under way, by time.time(). dry: tiny sizes on the CPU, to show that the code runs.
    words: only rows whose names have all of them. carried: a folder of `make gpu-pack`. place: puts
    a module on a fake GPU (`tools.fake_gpu`).
    """

    command: str
    part: str = ""
    file: Path | None = None
    deadline: float = math.inf
    dry: bool = False
    words: Sequence[str] = ()
    carried: Path | None = None
    place: Callable[[torch.nn.Module], torch.nn.Module] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda:0")

    @property
    def left(self) -> float:
        """Seconds; a dry run's are not counted."""
        return math.inf if self.dry else self.deadline - time.time()

    def begins(self, name: str, seconds: float) -> bool:
        """Is the row chosen and is there time for it? If there is none, a row says so."""
        chosen = all(word in name for word in self.words)
        if chosen and self.left < seconds:
            self.add(name, skipped=f"no time left: it takes about {seconds:.0f} s")
        return chosen and self.left >= seconds

    def add(self, name: str, say: str = "", **row: Any) -> None:
        """A row; say: what is printed of it. ok=False: the command's status is not 0."""
        self.rows.append({"part": self.part, "name": name, **row})
        if self.file is not None:
            its = {"rows": self.rows[-1:]}
            results.merge(self.file, "gpu", self.facts, its, PLACE, command=self.command)
        failed = "FAILED" if row.get("ok") is False else ""
        said = ", ".join(filter(None, (failed, say, row.get("skipped", ""))))
        print(f"{self.part}: {name}: {said or 'done'}", flush=True)

    def run(
        self, name: str, command: Sequence[str], *, when_dry: bool = False, **environment: str
    ) -> str | None:
        """Runs a program until the part's deadline, and adds its row; why it failed, None if it did
        not. What it prints is printed as it comes.

        Where it was not done in time it is ended with all that it had started: by SIGTERM, and 2
        seconds later by SIGKILL.
        """
        if self.dry and not when_dry:
            self.add(name, f"dry run, not run: {' '.join(command)}")
            return None
        lines, seconds = [], max(self.left, 1)
        with subprocess.Popen(
            ["timeout", "--kill-after=2", str(seconds), *command],
            cwd=ROOT,
            env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            try:
                for text in process.stdout:
                    lines.append(text)
                    print(text, end="", flush=True)
            except BaseException:  # SystemExit of a SIGTERM, too
                process.terminate()
                raise
        code, last = process.returncode, "".join(lines[-1:]).strip()
        if code == 0 or self.left <= 0:
            self.add(name, last, **({"skipped": "cut off, no time left"} if code else {}))
            return None
        self.add(name, last, ok=False, output="".join(lines)[-TAIL:])
        return last or str(code)

    def config(self, size: str) -> ECARConfig:
        return TINY if self.dry else ECARConfig.preset(size)


def render(record: dict[str, Any]) -> str:
    """A table for each part; what was cut off or failed says so."""
    lines = [f"`make gpu-{record['command']}`"]
    if any(run["dry_run"] for run in record["runs"]):
        lines.append("A dry run at tiny sizes on the CPU: it shows that the code runs, no more.")
    for part in dict.fromkeys(row["part"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["part"] == part]
        cells = [
            {name: _cell(name, row[name]) for name in row if name not in HIDDEN}
            | ({"run": str(row["run"] + 1)} if len(record["runs"]) > 1 else {})
            for row in rows
        ]
        lines += [f"**{part}**", table(cells)]
        lines += [f"```\n{row['output'].rstrip()}\n```" for row in rows if row.get("output")]
    return "\n\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_cell(name, part)}" for key, part in value.items())
    if isinstance(value, float):
        return duration(value) if name.endswith("seconds") else f"{value:.4g}"
    return "-" if value is None else str(value).replace("|", "/")

"""What a part of a command is given, the rows that it leaves, and the programs that it runs."""

import contextlib
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import ROOT
from ecar import ECARConfig
from ecar_kernels.registry import BACKENDS, BackendUnavailableError, BoundOp, resolve

TINY = ECARConfig(stage_sides=(4, 8), num_classes=10, width=32, heads=2, ar_layers=2, flow_blocks=2)
ROW = "row: "  # begins the line of a row
TAIL = 2000  # characters kept of what failed
OUT_OF_TIME = 124
Line = Callable[[str], object]


@dataclass
class Work:
    """A part's settings and rows.

    deadline: by time.time(). dry: tiny sizes on the CPU, to show that the code runs. words: only
    rows whose names have all of them. carried: a folder of `benchmarks.gpu.build pack`. place: puts
    a module on a fake GPU (`tools.fake_gpu`).
    """

    command: str
    part: str
    deadline: float = math.inf
    dry: bool = False
    words: Sequence[str] = ()
    carried: Path | None = None
    place: Callable[[torch.nn.Module], torch.nn.Module] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda:0")

    @property
    def left(self) -> float:
        """Seconds; a dry run's are not counted."""
        return math.inf if self.dry else self.deadline - time.time()

    @property
    def rates(self) -> dict[str, float]:
        """As `timing.measure_rates` found them: by name, bytes, multiply-adds or launches."""
        return {row["name"]: row["value"] for row in self.rows if "unit" in row}

    def chosen(self, name: str) -> bool:
        return all(word in name for word in self.words)

    def begins(self, name: str, seconds: float) -> bool:
        """Is the row chosen and is there time for it? If there is none, a row says so."""
        if self.chosen(name) and self.left < seconds:
            self.add(name, skipped=f"no time left: it takes about {seconds:.0f} s")
        return self.chosen(name) and self.left >= seconds

    def span(self, seconds: float) -> float:
        """How long to measure one thing; a dry run makes its rounds and no more."""
        return 0.0 if self.dry else seconds

    def add(self, name: str, say: str = "", **row: Any) -> None:
        """A row; say: what is printed of it. ok=False: the command's status is not 0."""
        self.rows.append({"name": name, **row})
        print(ROW + json.dumps(self.rows[-1]), flush=True)
        failed = "FAILED" if row.get("ok") is False else ""
        said = ", ".join(filter(None, (failed, say, row.get("skipped", ""))))
        print(f"{self.part}: {name}: {said or 'done'}", flush=True)

    def run(
        self, command: Sequence[str], more: dict[str, str] | None = None, line: Line = len
    ) -> tuple[int, str]:
        """`run`, until the part's deadline; a dry run runs nothing."""
        if self.dry:
            return 0, f"dry run, not run: {' '.join(command)}"
        return run(command, max(self.left, 1), more, line)

    def ran(self, name: str, code: int, output: str, say: str = "", **row: Any) -> None:
        """The row of what `run` returned."""
        row |= {"ok": code in (0, OUT_OF_TIME), "output": output[-TAIL:] if code else ""}
        cut = {"skipped": "cut off, no time left"} if code == OUT_OF_TIME else {}
        self.add(name, say, **row, **cut)

    def config(self, size: str) -> ECARConfig:
        return TINY if self.dry else ECARConfig.preset(size)

    def backends(
        self, op: str, dtype: torch.dtype = torch.bfloat16, width: int = 0
    ) -> dict[str, BoundOp]:
        """The op by each backend that serves it here, the reference first and "auto" last."""
        found = {}
        for name in (*BACKENDS, "auto"):
            with contextlib.suppress(BackendUnavailableError):
                found[name] = resolve(
                    op, device=self.device, dtype=dtype, width=width, backend=name
                )
        return found

    def placed(self, given: dict[str, Any]) -> dict[str, Any]:
        """An op's arguments on the device, and the one that names it."""
        found = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in given.items()}
        return found | {"device": self.device} if "device" in given else found


def run(
    command: Sequence[str], seconds: float, more: dict[str, str] | None = None, line: Line = len
) -> tuple[int, str]:
    """Exit status and output, each line given to `line` as it comes. more: of its environment.

    The status is OUT_OF_TIME where the command was ended, with all that it had started, for it was
    not done in time: by SIGTERM, so that it can end what has a process group of its own, and 2
    seconds later by SIGKILL. It is ended, too, where this process is.
    """
    lines, end = [], time.monotonic() + seconds
    with subprocess.Popen(
        ["timeout", "--kill-after=2", str(seconds), *command],
        cwd=ROOT,
        env={**os.environ, **(more or {}), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            for text in process.stdout:
                lines.append(text)
                line(text)
        except BaseException:  # SystemExit of a SIGTERM, too
            process.terminate()
            raise
    return OUT_OF_TIME if time.monotonic() >= end else process.returncode, "".join(lines)

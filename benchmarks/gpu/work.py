"""What a part of a command is given, and where it leaves its rows, one by one."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from ecar import ECARConfig
from ecar_kernels.registry import resolve

TINY = ECARConfig(stage_sides=(4, 8), num_classes=10, width=32, heads=2, ar_layers=2, flow_blocks=2)


@dataclass
class Work:
    """A part's settings and rows; each row is in the command's record before the next is begun.

    file: the record, None to keep none. deadline: by time.time(). dry: tiny sizes on the CPU, to
    show that the code runs. words: only rows whose names have all of them. carried: folder that
    `benchmarks.gpu.carry` wrote. place: puts a module on a fake GPU (`tools.fake_gpu`).
    """

    command: str
    part: str
    file: Path | None = None
    deadline: float = math.inf
    dry: bool = False
    words: tuple[str, ...] = ()
    carried: Path | None = None
    place: Callable[[torch.nn.Module], torch.nn.Module] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.record = {} if self.file is None else results.read(self.file)
        if self.record:
            started = {"status": "under way", "seconds": 0.0, "rows": self.rows, "output": ""}
            self.record["parts"][self.part] = started
        self.on = on(self.record.get("environment", {}))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def left(self) -> float:
        """Seconds; a dry run's are not counted."""
        return math.inf if self.dry else self.deadline - time.time()

    @property
    def rates(self) -> dict[str, float]:
        """As `timing.measure_rates` found them: by name, bytes, multiply-adds or launches."""
        parts = self.record.get("parts", {}).values()
        return {
            row["name"]: row["value"] for part in parts for row in part["rows"] if "unit" in row
        }

    def chosen(self, name: str) -> bool:
        return all(word in name for word in self.words)

    def begins(self, name: str, seconds: float) -> bool:
        """Is the row chosen and is there time for it? If there is none, a row says so."""
        if not self.chosen(name):
            return False
        if self.left < seconds:
            self.add(name, skipped=f"no time left: it takes about {seconds:.0f} s")
            return False
        return True

    def span(self, seconds: float) -> float:
        """How long to measure one thing; a dry run makes its rounds and no more."""
        return 0.0 if self.dry else seconds

    def add(self, name: str, say: str = "", **row: Any) -> None:
        """A row; say: what is printed of it. ok=False: the command's status is not 0."""
        self.rows.append({"name": name, **row, "on": self.on})
        if self.record:
            results.save(self.file, self.record)
        failed = "FAILED" if row.get("ok") is False else ""
        said = ", ".join(filter(None, (failed, say, row.get("skipped", ""))))
        print(f"{self.part}: {name}: {said or 'done'}", flush=True)

    def config(self, size: str) -> ECARConfig:
        return TINY if self.dry else ECARConfig.preset(size)

    @property
    def cache_bytes(self) -> int:
        """Of the last-level cache."""
        return 2**16 if self.dry else torch.cuda.get_device_properties(self.device).L2_cache_size


def on(facts: dict[str, Any]) -> str:
    """The device and the versions that a row was measured with."""
    if not facts:
        return ""
    versions = {"CUDA": facts["gpu"].get("CUDA"), **facts["versions"]}
    found = [f"{n} {versions[n]}" for n in ("torch", "triton", "CUDA") if versions.get(n)]
    return ", ".join([facts["gpu"]["name"], *found])


def served(op: str, device: torch.device, dtype: torch.dtype, width: int = 0) -> str | None:
    """The backend that "auto" takes for the op."""
    return resolve(op, device=device, dtype=dtype, width=width, backend="auto").backend

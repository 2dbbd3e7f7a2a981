"""What a part of the run is given and where it leaves its rows, one by one."""

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ecar.config import ECARConfig

TINY = {"stage_sides": (4, 8), "num_classes": 10, "width": 32, "heads": 2, "ar_layers": 2,
        "flow_blocks": 2}


@dataclass
class Work:
    """One part's settings, deadline and rows; each row is on disk before the next is begun.

    deadline: by time.time(). dry: tiny sizes on the CPU, to show that the code runs. rates: what
    the rates' part measured.
    """

    file: Path
    deadline: float
    dry: bool = False
    rates: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def left(self) -> float:
        """Seconds; a dry run's are not counted."""
        return math.inf if self.dry else self.deadline - time.time()

    def span(self, seconds: float) -> float:
        """How long to measure one thing; a dry run makes its rounds and no more."""
        return 0.0 if self.dry else seconds

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        partial = self.file.with_name(f"{self.file.name}.partial")
        partial.write_text(json.dumps(self.rows), encoding="utf-8")
        os.replace(partial, self.file)

    def config(self, size: str) -> ECARConfig:
        return ECARConfig(**TINY) if self.dry else ECARConfig.preset(size)

    @property
    def cache_bytes(self) -> int:
        """Of the last-level cache."""
        return 2**16 if self.dry else torch.cuda.get_device_properties(self.device).L2_cache_size

"""The training's log: rows of a CSV file, and TensorBoard's event files if asked for."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from ecar.files import append, atomic_path, naming

__all__ = ["Log"]


class Log:
    """Appends one row of numbers at a time to ``folder/log.csv``.

    Args:
        folder: exists.
        columns: names; the first is "step".
        kind: "csv", or "tensorboard" for event files in ``folder/tensorboard`` as well.
        step: rows after this step, left by a training that was killed, are dropped.

    Raises:
        ImportError: if TensorBoard is asked for and not installed.
        ValueError: if the file's columns are others.
        OSError: naming the file, if it can't be written.
    """

    def __init__(self, folder: Path, columns: list[str], *, kind: str, step: int) -> None:
        self.path, self.events = folder / "log.csv", folder / "tensorboard"
        self.columns = columns
        rows = self._rows_up_to(step) if step else []
        with atomic_path(self.path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        self._writer = None
        if kind == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ImportError(
                    "argument 'log': 'tensorboard' needs TensorBoard: pip install tensorboard"
                ) from None
            with naming(self.events):
                self._writer = SummaryWriter(str(self.events), purge_step=step + 1)

    def _rows_up_to(self, step: int) -> list[list[str]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            header, *rows = list(csv.reader(file)) or [self.columns]
        if header != self.columns:
            raise ValueError(f"{self.path}: expected the columns {','.join(self.columns)}")
        # A row that a kill cut short has fewer cells, and lies after the last state anyhow.
        return [row for row in rows if len(row) == len(header) and int(row[0]) <= step]

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row, whole or not at all; OSError naming the file."""
        line = io.StringIO(newline="")
        csv.writer(line).writerow(
            [
                value if isinstance(value, int) else f"{value:.6g}"
                for value in (row[name] for name in self.columns)
            ]
        )
        append(self.path, line.getvalue())
        if self._writer is not None:
            with naming(self.events):
                for name, value in row.items():
                    if name != "step":
                        self._writer.add_scalar(name, value, row["step"])
                self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

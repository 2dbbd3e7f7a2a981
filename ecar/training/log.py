"""The training's log: rows of CSV files, and TensorBoard's event files if asked for."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ecar.files import append, atomic_path, check_output_folder, naming
from ecar.training.config import TrainConfig

__all__ = ["Log", "columns", "open_log"]


class _Table:
    """A CSV file of numbers, whose first column is "step"; see `Log`."""

    def __init__(self, path: Path, columns: Sequence[str], step: int) -> None:
        self.path, self.columns = path, list(columns)
        self.rows = self._rows_up_to(step) if step else []
        with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([self.columns, *self.rows])

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


class Log:
    """Appends rows of numbers to ``folder/log.csv`` and ``folder/validation.csv``.

    Args:
        folder: exists.
        columns: names; the first is "step".
        validation: those of validation.csv, likewise; without any there is no such file.
        kind: "csv", or "tensorboard" for event files in ``folder/tensorboard`` as well, which also
            get the sample sheets.
        step: rows after this step, left by a training that was killed, are dropped.

    Attributes:
        least: the least validation loss so far; infinity before the first.

    Raises:
        ImportError: if TensorBoard is asked for and not installed.
        ValueError: if a file's columns are others.
        OSError: naming the file, if it can't be written.
    """

    def __init__(
        self,
        folder: Path,
        columns: Sequence[str],
        validation: Sequence[str] = (),
        *,
        kind: str,
        step: int,
    ) -> None:
        self.path, self.events = folder / "log.csv", folder / "tensorboard"
        self._rows = _Table(self.path, columns, step)
        self._validation = None
        self.least = float("inf")
        if validation:
            self._validation = _Table(folder / "validation.csv", validation, step)
            place = list(validation).index("loss")
            self.least = min((float(row[place]) for row in self._validation.rows), default=np.inf)
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

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row to log.csv, whole or not at all; OSError naming the file."""
        self._rows.write(row)
        self._scalars(row, "")

    def validated(self, row: Mapping[str, float]) -> bool:
        """Append a row to validation.csv. Returns whether its loss is the least so far."""
        assert self._validation is not None
        self._validation.write(row)
        self._scalars(row, "validation/")
        best = row["loss"] < self.least
        self.least = min(row["loss"], self.least)
        return best

    def _scalars(self, row: Mapping[str, float], prefix: str) -> None:
        if self._writer is not None:
            with naming(self.events):
                for name, value in row.items():
                    if name != "step":
                        self._writer.add_scalar(prefix + name, value, row["step"])
                self._writer.flush()

    def sheet(self, picture: Image.Image, step: int) -> None:
        """Give TensorBoard a sample sheet, where there is TensorBoard."""
        if self._writer is not None:
            with naming(self.events):
                pixels = np.asarray(picture.convert("RGB"))
                self._writer.add_image("samples", pixels, step, dataformats="HWC")
                self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def columns(stages: int) -> list[str]:
    """The columns of log.csv."""
    numbers = range(1, stages + 1)
    return [
        "step",
        "images",
        "lr",
        "loss",
        *(f"loss_{s}" for s in numbers),
        *(f"weight_{s}" for s in numbers),
        "grad_norm",
        "images_per_second",
        "seconds",
    ]


def open_log(config: TrainConfig, step: int, *, validates: bool) -> Log:
    """Make the output folder, and in it train.json and the files that rows are appended to.

    Raises:
        OSError, ValueError, ImportError: the folder cannot be written; see `Log`.
    """
    output, stages = Path(config.output_dir), config.model.num_stages
    output.mkdir(parents=True, exist_ok=True)
    check_output_folder(output)
    config.to_json(output / "train.json")
    losses = ["loss", *(f"loss_{s}" for s in range(1, stages + 1))]
    others = list(config.averages)[1:]
    validation = ["step", "images", *losses, *others] if validates else []
    return Log(output, columns(stages), validation, kind=config.log, step=step)

"""Timed calls of ops, alike for the records of `make bench` and of `make gpu`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OURS = "ours"
# What the GPU record calls an op's backends; the last that served is what "auto" takes.
BACKENDS = ("reference", "native", "triton")
# A graph holds a backward only with its forward.
GROUPS = {"training forward": ", all stages", "forward and backward": ", with its forward"}
NAMES = {"reference": "eager", "compiled": "torch.compile"}


@dataclass(frozen=True)
class Row:
    """One op at one size. seconds: the median of each way that was timed, ours among them.

    bytes, multiply_adds: what the op needs at least; bytes 0 where that was not recorded.
    """

    op: str
    size: str
    tokens: int
    batch: int
    backward: bool
    bytes: int
    multiply_adds: int
    seconds: dict[str, float]

    @property
    def ours(self) -> float:
        return self.seconds[OURS]

    @property
    def peers(self) -> dict[str, float]:
        return {name: value for name, value in self.seconds.items() if name != OURS}


def rows(record: dict[str, Any]) -> list[Row]:
    """Those in which ours was timed; calls timed for their overhead are no sizes of interest."""
    found = _gpu(record) if record["kind"] == "gpu" else _micro(record)
    return [row for row in found if OURS in row.seconds]


def rates(record: dict[str, Any]) -> dict[str, float] | None:
    """Bytes and multiply-adds a second that the device reached in that run."""
    if record["kind"] != "gpu":
        found = record.get("rates")
        return found and {
            "bytes": found["bytes_per_second"],
            "multiply_adds": found["multiply_adds_per_second"],
        }
    measured = {row["name"]: row["value"] for row in _gpu_rows(record) if "unit" in row}
    if not {"copy", "bfloat16"} <= measured.keys():
        return None
    return {"bytes": measured["copy"], "multiply_adds": measured["bfloat16"]}


def batches(found: list[Row]) -> str:
    """A few words on what was measured."""
    return f"batch {', '.join(map(str, sorted({row.batch for row in found})))}"


def medians(seconds: dict[str, Any]) -> dict[str, float]:
    """Of what was timed; a way that was not has a reason in its place, or nothing."""
    return {
        NAMES.get(name, name): value["median"]
        for name, value in seconds.items()
        if isinstance(value, dict) and "median" in value
    }


def _micro(record: dict[str, Any]) -> Iterator[Row]:
    for row in record["rows"]:
        if not row.get("overhead"):
            op = f"{row['op']}, all stages" if row.get("whole") else row["op"]
            yield Row(
                op,
                row["size"],
                row["tokens"],
                row["batch"],
                row.get("backward", False),
                row.get("bytes", 0),
                row.get("multiply_adds", 0),
                medians(row["seconds"]),
            )


def _gpu(record: dict[str, Any]) -> Iterator[Row]:
    for row in _gpu_rows(record):
        if "group" not in row:
            continue
        timed = {name: value["median"] for name, value in row.get("variants", {}).items()}
        own = [name for name in BACKENDS[1:] if name in timed]
        seconds = {NAMES.get(name, name): value for name, value in timed.items() if name not in own}
        if own:
            seconds[OURS] = timed[own[-1]]
        op = row["op"].removesuffix(", all stages") + GROUPS.get(row["group"], "")
        yield Row(
            op,
            row["size"],
            row["tokens"],
            row["batch"],
            "backward" in row["group"],
            row.get("bytes", 0),
            row.get("multiply_adds", 0),
            seconds,
        )


def _gpu_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for part in record["parts"].values() for row in part["rows"]]

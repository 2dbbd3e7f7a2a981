"""`python -m benchmarks.targets`: every op beside its targets, from the committed microbenchmarks.

The targets are the CPU's: of the elementwise ops at 64 MiB, a part of a copy's rate and a multiple
of the eager reference's speed; of every op, nowhere slower than torch.compile.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases, results
from benchmarks.micro.table import fraction_of_floor
from benchmarks.results import figures, markdown

OF_COPY, OF_EAGER = 0.8, 3.0
AT_64_MIB = ("adaln", "gated_residual_adaln", "euler_step", "upsample_renoise_euler")


def render(records: Sequence[dict[str, Any]]) -> str:
    """Two tables of the microbenchmarks of one device; a case timed in two runs has two rows."""
    rows = [row for record in records for row in record["rows"] if not row.get("overhead")]
    large = {(case.op, case.size, case.tokens, case.batch) for case in cases.at_64_mib()}
    at_64_mib = [
        row
        for row in rows
        if row["op"] in AT_64_MIB
        and not row["backward"]
        and (row["op"], row["size"], row["tokens"], row["batch"]) in large
    ]
    groups: dict[tuple[str, bool], list] = {}
    for row in rows:
        if "compiled" in row["seconds"]:
            groups.setdefault((row["op"], row["backward"]), []).append(row)
    return "\n\n".join(
        (
            markdown(
                (
                    "at 64 MiB",
                    "of a copy's rate",
                    f"wanted >= {OF_COPY:.0%}",
                    "times eager's speed",
                    f"wanted >= {OF_EAGER:g}x",
                ),
                map(_large, at_64_mib),
            ),
            markdown(
                ("beside torch.compile", "rows", "slower", "the slowest", "which"),
                (_beside(*key, group) for key, group in groups.items()),
            ),
        )
    )


def _large(row: dict[str, Any]) -> tuple[str, ...]:
    rate = fraction_of_floor(row)
    speed = _speed(row, "eager")
    return (
        row["op"],
        f"{rate:.0%}",
        _mark(rate >= OF_COPY),
        f"{figures(speed)}x",
        _mark(speed >= OF_EAGER),
    )


def _beside(op: str, backward: bool, rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    least = min(rows, key=lambda row: _speed(row, "compiled"))
    slower = sum(_speed(row, "compiled") < 1 for row in rows)
    size = "" if least["size"] == "-" else f"{least['size']}, "
    return (
        op + ", backward" * backward,
        str(len(rows)),
        str(slower) if slower else "none",
        f"{figures(_speed(least, 'compiled'))}x",
        f"{size}{least['tokens']} tokens, batch {least['batch']}",
    )


def _speed(row: dict[str, Any], other: str) -> float:
    """How many times as fast ours is."""
    return row["seconds"][other]["median"] / row["seconds"]["ours"]["median"]


def _mark(met: bool) -> str:
    return "met" if met else "MISSED"


def of_devices(folder: Path = results.FOLDER) -> str:
    """The tables of every device that has microbenchmarks."""
    parts = []
    for device in sorted(path for path in folder.glob("*") if path.is_dir()):
        records = [
            record
            for record in map(results.read, sorted(device.glob("micro*.json")))
            if record["kind"] == "micro" and "rates" in record
        ]
        if records:
            dates = " and ".join(record["environment"]["date"] for record in records)
            parts.append(f"{render(records)}\n\n{records[0]['environment']['device']}; {dates}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(of_devices() or "Not measured yet.")

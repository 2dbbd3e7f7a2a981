"""`make bench-check`: has anything become slower than the committed results say?

Times differ from day to day, so ratios are compared: the times of eager and torch.compile over
ecar_kernels', of each op at its largest stage, now and in the committed rows of the same device,
threads and torch.
A row is lost if a ratio fell by more than LEAST, and by a greater factor than one and NOISE times
the noise: the root of the sum of squares of four relative interquartile ranges, of both ways'
rounds in both runs. What looks lost is measured once more, for longer, and lost if it is so again.

And instructions, which have no noise: `benchmarks.instructions`, if valgrind is installed.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases, instructions, micro, results
from benchmarks.micro import NAMES, Job, Row, key

# Least: two runs of the same code an hour apart on two cores of a Zen 4 differed by 11 % in one of
# 26 rows, measured twice; what is between processes is in no run's own spread.
NOISE, LEAST = 1.5, 0.15
AGAIN = 3  # times as long, the second time
WAYS = micro.OWN[:2]


def selection() -> list[Job]:
    """Each op at 64 MiB, and at the last stage of an image of S and L."""
    large = [case for case in cases.select(("S", "L"), forward=(1,)) if case.tokens == 256]
    training = [*cases.attention("S"), cases.Case("stage_attention", 256, 8, "S", backward=True)]
    return [Job(case) for case in [*large, *cases.at_64_mib(), *training]]


def relative_range(summary: dict[str, float]) -> float:
    return (summary["q3"] - summary["q1"]) / summary["median"]


def noise(before: Row, now: Row, way: str) -> float:
    """Of the quotient of a row's two ratios: as a share of it."""
    return math.hypot(
        *(relative_range(row["seconds"][name]) for row in (before, now) for name in (way, "ours"))
    )


def ratio(row: Row, way: str) -> float:
    return row["seconds"][way]["median"] / row["seconds"]["ours"]["median"]


def allowed(before: Row, now: Row, way: str) -> float:
    """How much of the ratio may be gone: as a share of it, less than all."""
    explained = NOISE * noise(before, now, way)
    return max(explained / (1 + explained), LEAST)


def judge(before: Row, now: Row) -> list[str]:
    """What this row has lost, a line for each ratio."""
    lost = []
    for way in _both(before, now):
        was, found, share = ratio(before, way), ratio(now, way), allowed(before, now, way)
        if found < was * (1 - share):
            lost.append(
                f"{_name(now)}: vs {NAMES.get(way, way)} {found:.2f}x, was "
                f"{was:.2f}x: {found / was - 1:+.0%}, noise allows -{share:.0%}"
            )
    return lost


def _both(before: Row, now: Row) -> list[str]:
    return [way for way in WAYS if way in before["seconds"] and way in now["seconds"]]


def comparable(committed: dict[str, Any], here: dict[str, Any]) -> str | None:
    """Why a run's ratios mean nothing here; None if they do."""
    for what in ("device", "threads"):
        if committed[what] != here[what]:
            return f"they are of {what} {committed[what]}, here it is {here[what]}"
    was, now = committed["versions"]["torch"], here["versions"]["torch"]
    return None if was == now else f"they are of torch {was}, here it is {now}"


def measure(chosen: Sequence[Job], seconds: float, minutes: float) -> dict[tuple, Row]:
    with tempfile.TemporaryDirectory() as folder:
        file = results.path("micro", Path(folder))
        rows = micro.run(chosen, file, seconds=seconds, minutes=minutes)
    return {key(row): row for row in rows}


def check_ratios(file: Path, seconds: float, minutes: float) -> bool:
    """Prints what was compared; False if a row is lost, or nothing was measured."""
    here = results.describe()
    if not file.exists():
        print(f"ratios: not compared: nothing committed for {here['device']}")
        return True
    record = results.read(file)
    reasons = [comparable(this["environment"], here) for this in record["runs"]]
    committed = {key(row): row for row in record["rows"] if reasons[row["run"]] is None}
    for reason in dict.fromkeys(filter(None, reasons)):
        print(f"ratios: not compared with {file}: {reason}")
    jobs = {_key(job): job for job in selection()}
    jobs = {name: job for name, job in jobs.items() if name in committed}
    if not jobs:
        print("ratios: none to compare")
        return True
    rows = measure(list(jobs.values()), seconds, minutes)
    for name, row in rows.items():
        print(_line(committed[name], row))
    suspects = [name for name, row in rows.items() if judge(committed[name], row)]
    lost: list[str] = []
    if suspects:
        print(f"once more, for {AGAIN} times as long: {len(suspects)} rows")
        again = measure([jobs[name] for name in suspects], AGAIN * seconds, minutes)
        for name in suspects:
            lost += judge(committed[name], again.get(name, rows[name]))
    print(
        "\n".join(f"LOST: {line}" for line in lost)
        or f"ratios: {len(rows)} rows of {len(jobs)}, none lost; load before {here['load_before']}"
    )
    return bool(rows) and not lost


def check_instructions() -> bool:
    try:
        return instructions.main([]) == 0
    except SystemExit as error:  # a tool is missing, or fails
        print(error.code)
        return "skipped" in str(error.code)


def _key(job: Job) -> tuple:
    case = job.case
    return (case.op, case.size, case.tokens, case.batch, case.backward, case.whole, job.overhead)


def _name(row: Row) -> str:
    way = " backward" if row["backward"] else ""
    return f"{row['op']}{way} {row['size']} {row['tokens']} tokens, batch {row['batch']}"


def _line(before: Row, now: Row) -> str:
    parts = [
        f"vs {NAMES.get(way, way)} {ratio(before, way):.2f}x -> {ratio(now, way):.2f}x"
        for way in _both(before, now)
    ]
    return f"{_name(now)}: {', '.join(parts)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--only", choices=("ratios", "instructions"))
    parser.add_argument(
        "--seconds", type=float, default=0.8, help="of measuring for each row (default: 0.8)"
    )
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="start no row later (default: 4)"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="default: the committed micro.json of this device",
    )
    options = parser.parse_args(arguments)
    well = True
    if options.only != "instructions":
        file = options.against or results.path("micro")
        well = check_ratios(file, options.seconds, options.minutes)
    if options.only != "ratios":
        well = check_instructions() and well
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

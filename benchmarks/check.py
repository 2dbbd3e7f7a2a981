"""`make bench-check`: has anything become slower than the committed results say?

Ratios, for times differ from day to day: a quick run of each op at its largest stage (eager over
ours, compiled over ours) is held against the committed results of the same device, threads and
torch. A row is lost where a ratio fell by more than LEAST, and by a greater factor than one and
NOISE times the noise: a fall great enough is a loss in any noise. The noise is the root of the sum
of squares of four relative interquartile ranges: of both ways' rounds, then and now. What looks
lost is measured once more, for longer, and lost if it is so again.

And instructions, which have no noise: `benchmarks.instructions`, where there is valgrind.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases, environment, instructions, results
from benchmarks.micro.table import NAMES

# Least: two runs of the same code an hour apart on two cores of a Zen 4 differed by 11 % in one of
# 26 rows, measured twice; what is between processes is in no run's own spread.
NOISE, LEAST = 1.5, 0.15
AGAIN = 3  # times as long, the second time
WAYS = ("eager", "compiled")
KEY = ("op", "size", "tokens", "batch", "backward")
Row = dict[str, Any]


def selection() -> list[cases.Case]:
    """Each op at 64 MiB, and at the last stage of an image of S and L."""
    large = [case for case in cases.select(("S", "L"), forward=(1,)) if case.tokens == 256]
    return [
        *large,
        *cases.at_64_mib(),
        *cases.attention("S"),
        cases.Case("stage_attention", 256, 8, "S", backward=True),
    ]


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
    for way in WAYS:
        if way not in before["seconds"] or way not in now["seconds"]:
            continue
        was, found, share = ratio(before, way), ratio(now, way), allowed(before, now, way)
        if found < was * (1 - share):
            lost.append(
                f"{_name(now)}: {NAMES.get(way, way)} / ours {found:.2f}x, was "
                f"{was:.2f}x: {found / was - 1:+.0%}, noise allows -{share:.0%}"
            )
    return lost


def by_key(records: Sequence[dict[str, Any]]) -> dict[tuple, Row]:
    """The rows of records that compare ways, by what they time."""
    return {
        (*(row[key] for key in KEY), bool(row.get("whole"))): row
        for record in records
        for row in record["rows"]
        if not row.get("overhead")
    }


def comparable(committed: dict[str, Any], here: dict[str, Any]) -> str | None:
    """Why a committed record's ratios mean nothing here; None where they do."""
    for what, of in (("device", committed["device"]), ("threads", committed["threads"])):
        if of != here[what]:
            return f"they are of {what} {of}, here it is {here[what]}"
    was, now = committed["versions"]["torch"], here["versions"]["torch"]
    return None if was == now else f"they are of torch {was}, here it is {now}"


def measure(chosen: Sequence[cases.Case], seconds: float, minutes: float) -> dict[tuple, Row]:
    """A run of `python -m benchmarks`, of these cases alone."""
    with tempfile.TemporaryDirectory() as folder:
        # In the brackets of pytest's names, for one op's name is the end of another's.
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmarks",
                "--results",
                folder,
                f"--seconds={seconds}",
                f"--minutes={minutes}",
                "-k",
                " or ".join(f"[{case.name}]" for case in chosen),
            ],
            cwd=results.ROOT,
            text=True,
            capture_output=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"python -m benchmarks failed:\n{done.stdout}\n{done.stderr}")
        return by_key([results.read(results.path("micro", Path(folder)))])


def check_ratios(files: Sequence[Path], seconds: float, minutes: float) -> bool:
    """Prints what was compared; False where a row is lost, or nothing could be compared."""
    here = environment.describe()
    records = [results.read(file) for file in files]
    if not records:
        print(f"ratios: not compared: nothing committed for {here['device']}")
        return True
    for file, record in zip(files, records, strict=True):
        if (why := comparable(record["environment"], here)) is not None:
            print(f"ratios: not compared with {file}: {why}")
            return True
    committed = by_key(records)
    known = {_key(case): case for case in selection() if _key(case) in committed}
    found = measure(list(known.values()), seconds, minutes)
    rows = {key: row for key, row in found.items() if key in known}
    for key, row in rows.items():
        print(_line(committed[key], row))
    suspects = [key for key, row in rows.items() if judge(committed[key], row)]
    lost: list[str] = []
    if suspects:
        print(f"once more, for {AGAIN} times as long: {len(suspects)} rows")
        again = measure([known[key] for key in suspects], AGAIN * seconds, minutes)
        lost = [
            line for key in suspects for line in judge(committed[key], again.get(key, rows[key]))
        ]
    missing = [case.name for key, case in known.items() if key not in rows]
    if missing:
        print(f"ratios: {minutes:g} minutes were over before {', '.join(missing)}")
    print(
        "\n".join([f"LOST: {line}" for line in lost])
        or f"ratios: {len(rows)} rows, none lost; load before {here['load_before']}"
    )
    return bool(rows) and not lost


def check_instructions() -> bool:
    try:
        return instructions.main([]) == 0
    except SystemExit as error:  # a tool is missing, or fails
        print(error.code)
        return "skipped" in str(error.code)


def _key(case: cases.Case) -> tuple:
    return (case.op, case.size, case.tokens, case.batch, case.backward, case.whole)


def _name(row: Row) -> str:
    way = " backward" if row["backward"] else ""
    return f"{row['op']}{way} {row['size']} {row['tokens']} tokens, batch {row['batch']}"


def _line(before: Row, now: Row) -> str:
    parts = [
        f"{NAMES.get(way, way)} / ours {ratio(before, way):.2f}x -> {ratio(now, way):.2f}x"
        for way in WAYS
        if way in before["seconds"] and way in now["seconds"]
    ]
    return f"{_name(now)}: {', '.join(parts)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--only", choices=("ratios", "instructions"))
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.8,
        help="of measuring for each row (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=4.0,
        help="rows that would begin later are left out (default: %(default)s)",
    )
    parser.add_argument(
        "--against",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="default: the committed micro*.json of this device",
    )
    options = parser.parse_args(arguments)
    files = options.against or sorted(results.path("micro").parent.glob("micro*.json"))
    well = True
    if options.only != "instructions":
        well = check_ratios(files, options.seconds, options.minutes)
    if options.only != "ratios":
        well = check_instructions() and well
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

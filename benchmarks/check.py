"""`make bench-check`: has anything become slower than the committed results say?

Times differ from day to day, so ratios are compared, beyond their noise; instructions, which have
none; and all threads with one on a busy machine. benchmarks/README.md says how each is judged.
"""

import math
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import busy, cases, commands, instructions, micro, results
from benchmarks.cases import Case
from benchmarks.micro import NAMES, Row, case_of

# Least: two runs of the same code an hour apart on two cores of a Zen 4 differed by 11 % in one of
# 26 rows, measured twice; what is between processes is in no run's own spread.
NOISE, LEAST = 1.5, 0.15
AGAIN = 3  # times as long, the second time


def selection() -> list[Case]:
    """Each op beyond the caches, and at the last stage of an image of S and L."""
    training = [*cases.attention("S"), Case("stage_attention", 256, 8, "S", backward=True)]
    return [*cases.select(("S", "L"), forward=(1,), last=True), *cases.beyond_caches(), *training]


def noise(before: Row, now: Row, way: str) -> float:
    """Of the quotient of a row's two ratios: as a share of it."""
    found = [row["seconds"][name] for row in (before, now) for name in (way, "ours")]
    return math.hypot(*((each["q3"] - each["q1"]) / each["median"] for each in found))


def allowed(before: Row, now: Row, way: str) -> float:
    """How much of the ratio may be gone: as a share of it, less than all."""
    explained = NOISE * noise(before, now, way)
    return max(explained / (1 + explained), LEAST)


def ratios(before: Row, now: Row) -> dict[str, tuple[float, float]]:
    """Both rows' speed-ups over the ways that both have."""
    was, found = micro.speedups(before), micro.speedups(now)
    return {way: (was[way], found[way]) for way in was if way in found}


def judge(before: Row, now: Row) -> list[str]:
    """What this row has lost, a line for each ratio."""
    return [
        f"{case_of(now).name}: vs {NAMES[way]} {found:.2f}x, was {was:.2f}x: "
        f"{found / was - 1:+.0%}, noise allows -{share:.0%}"
        for way, (was, found) in ratios(before, now).items()
        for share in [allowed(before, now, way)]
        if found < was * (1 - share)
    ]


def comparable(committed: dict[str, Any], here: dict[str, Any]) -> str | None:
    """Why a run's ratios mean nothing here; None if they do."""
    for what in ("device", "threads", "torch"):
        was, now = ((facts | facts["versions"])[what] for facts in (committed, here))
        if was != now:
            return f"they are of {what} {was}, here it is {now}"
    return None


def measure(chosen: Iterable[Case], seconds: float, minutes: float) -> dict[Case, Row]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "micro.json"
        record, _ = micro.run([*chosen], file, seconds=seconds, minutes=minutes)
    return {case_of(row): row for row in record.get("rows", ())}


def check_ratios(file: Path, seconds: float, minutes: float) -> bool:
    """Prints what was compared; False if a row is lost, or nothing was measured."""
    here = results.describe()
    if not file.exists():
        print(f"ratios: not compared: nothing committed for {here['device']}")
        return True
    record = results.read(file)
    reasons = [comparable(this, here) for this in record["runs"]]
    committed = {case_of(row): row for row in record["rows"] if reasons[row["run"]] is None}
    for reason in dict.fromkeys(filter(None, reasons)):
        print(f"ratios: not compared with {file}: {reason}")
    chosen = [case for case in selection() if case in committed]
    if not chosen:
        print("ratios: none to compare")
        return True
    rows = measure(chosen, seconds, minutes)
    for case, row in rows.items():
        for way, (was, found) in ratios(committed[case], row).items():
            print(f"{case.name}: vs {NAMES[way]} {was:.2f}x -> {found:.2f}x")
    lost = {case: row for case, row in rows.items() if judge(committed[case], row)}
    if lost:
        print(f"once more, for {AGAIN} times as long: {len(lost)} rows")
        lost |= measure(lost, AGAIN * seconds, minutes)
    lines = [f"LOST: {line}" for case, row in lost.items() for line in judge(committed[case], row)]
    well = f"ratios: {len(rows)} rows of {len(chosen)}, none lost; load before"
    print("\n".join(lines) or f"{well} {here['load_before']}")
    return bool(rows) and not lines


def check_instructions() -> bool:
    try:
        return instructions.main([]) == 0
    except SystemExit as error:  # a tool is missing, or fails
        print(error.code)
        return "skipped" in str(error.code)


def check_busy() -> bool:
    """All threads next to one, as the ecar commands have them wait, where all cores are busy."""
    found = busy.ratio(busy.measure("ecar's", results.describe()["cores"], rounds=3))
    said = f"all threads take {found:.2f}x one thread's time, {busy.LIMIT}x allowed"
    print(f"{'LOST: ' * (found > busy.LIMIT)}busy machine: {said}")
    return found <= busy.LIMIT


def main() -> int:
    parser = commands.parser("check", __doc__, writes=False)
    add = parser.add_argument
    add("--only", choices=("ratios", "instructions", "busy"))
    add("--seconds", type=float, default=0.8, help="of measuring for each row (default: 0.8)")
    add("--minutes", type=float, default=4.0, help="start no row later (default: 4)")
    add("--against", type=Path, metavar="FILE", default=results.path("micro"),
        help="default: the committed micro.json of this device")  # fmt: skip
    options = parser.parse_args()
    parts = {
        "ratios": lambda: check_ratios(options.against, options.seconds, options.minutes),
        "instructions": check_instructions,
        "busy": check_busy,
    }
    return 0 if all([run() for name, run in parts.items() if options.only in (None, name)]) else 1


if __name__ == "__main__":
    sys.exit(main())

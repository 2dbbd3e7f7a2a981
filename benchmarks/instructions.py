"""Instructions of each C++ kernel under valgrind's callgrind, against the committed counts.

A count depends on the compiler and the sources, not on what else the machine does. Fails if a call
takes more than 1 % more instructions than committed; counts of another compiler are not compared.
Valgrind knows no AVX-512, so AVX2 and the baseline are counted.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import commands, results
from benchmarks.results import ROOT, table

BUILD = ROOT / "build" / "instructions"
RESULTS = results.FOLDER / "instructions.json"
MEASURED = "ecar_measured"  # of csrc/tests/instructions.cpp
ALLOWED = 0.01
SETS = ("avx2", "baseline")


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        raise SystemExit(f"instructions: skipped: {name} was not found on this machine")
    return found


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | environment
    )
    if done.returncode != 0:
        raise SystemExit(f"instructions: {command[0]} failed\n{done.stdout}\n{done.stderr}")
    return done.stdout


def build() -> str:
    """Builds the program; returns the compiler's name and version."""
    cmake, ninja = tool("cmake"), tool("ninja")
    settings = (f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_BUILD_TYPE=Release")
    run(cmake, "-S", ROOT, "-B", BUILD, "-G", "Ninja", *settings)
    run(cmake, "--build", BUILD, "--target", "instructions")
    cache = (BUILD / "CMakeCache.txt").read_text("utf-8")
    compiler = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", cache, re.MULTILINE)[1]
    name = Path(os.path.realpath(compiler)).name
    return f"{name}: {run(compiler, '-dumpfullversion', '-dumpversion').strip()}"


def count(isa: str) -> dict[str, int]:
    """Instructions of each call, in the program's order; none where the set is not supported."""
    with tempfile.TemporaryDirectory() as folder:
        # One dump for each return of the measured function, counting inside it alone.
        out = Path(folder) / "out"
        options = (f"--toggle-collect={MEASURED}", f"--dump-after={MEASURED}", "--combine-dumps=no")
        options = ("--tool=callgrind", *options, f"--callgrind-out-file={out}")
        printed = run(tool("valgrind"), *options, BUILD / "instructions", ECAR_CPU_ISA=isa)
        found, *calls = printed.splitlines()
        if found != isa:
            return {}
        dumps = [Path(f"{out}.{i}").read_text("utf-8") for i in range(1, len(calls) + 1)]
        totals = [int(re.search(r"^totals: (\d+)", dump, re.MULTILINE)[1]) for dump in dumps]
        return dict(zip(calls, totals, strict=True))


def count_all() -> dict[str, Any]:
    """The record: counts by instruction set and call, and what they depend on."""
    valgrind = run(tool("valgrind"), "--version").strip()
    facts = {"compiler": build(), "machine": platform.machine(), "valgrind": valgrind}
    return {**facts, "counts": {isa: found for isa in SETS if (found := count(isa))}}


def compare(record: dict[str, Any], committed: dict[str, Any]) -> list[str] | None:
    """Calls that take more instructions than committed, are new, or are gone; None if the committed
    counts are another compiler's."""
    for what in ("compiler", "machine"):
        if record[what] != committed[what]:
            print(f"\nnot compared: the committed counts are of {committed[what]}")
            return None
    found, known = (
        {f"{isa} {call}": n for isa, calls in of["counts"].items() for call, n in calls.items()}
        for of in (record, committed)
    )
    gone = [f"{call}: gone" for call in known if call not in found]
    return [*commands.risen(found, known, ALLOWED), *gone]


def render(record: dict) -> str:
    """The committed counts as a Markdown table."""
    counts = record["counts"]
    calls = dict.fromkeys(call for of_isa in counts.values() for call in of_isa)
    rows = [
        {"instructions of a call": call}
        | {isa: f"{found[call]:,}" for isa, found in counts.items() if call in found}
        for call in calls
    ]
    return f"{table(rows)}\n\n{record['machine']}; {record['compiler']}; {record['valgrind']}."


def main(arguments: Sequence[str] | None = None) -> int:
    return commands.check_counts(RESULTS, __doc__, count_all, compare, render, arguments)


if __name__ == "__main__":
    sys.exit(main())

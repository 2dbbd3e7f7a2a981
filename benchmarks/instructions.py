"""Instructions of each C++ kernel under valgrind's callgrind, against the committed counts.

A count depends on the compiler and the sources, not on what else the machine does. Fails if a call
takes more than 1 % more instructions than committed; counts of another compiler are not compared.
Valgrind knows no AVX-512, so AVX2 and the baseline are counted.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from benchmarks import results
from benchmarks.results import ROOT, markdown

BUILD = ROOT / "build" / "instructions"
RESULTS = results.FOLDER / "instructions.json"
MEASURED = "ecar_measured"  # of csrc/tests/instructions.cpp
ALLOWED = 0.01


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
    """Instructions of each call, in the program's order."""
    with tempfile.TemporaryDirectory() as folder:
        # One dump for each return of the measured function, counting inside it alone.
        out = Path(folder) / "out"
        printed = run(
            tool("valgrind"),
            "--tool=callgrind",
            f"--toggle-collect={MEASURED}",
            f"--dump-after={MEASURED}",
            "--combine-dumps=no",
            f"--callgrind-out-file={out}",
            BUILD / "instructions",
            ECAR_CPU_ISA=isa,
        )
        found, *calls = printed.splitlines()
        if found != isa:
            return {}
        return {
            call: int(
                re.search(r"^totals: (\d+)", Path(f"{out}.{i}").read_text("utf-8"), re.MULTILINE)[1]
            )
            for i, call in enumerate(calls, 1)
        }


def compare(counts: dict, committed: dict) -> list[str]:
    """Calls that take more instructions than committed, are new, or are gone."""
    found = {(isa, call): n for isa, calls in counts.items() for call, n in calls.items()}
    known = {(isa, call): n for isa, calls in committed.items() for call, n in calls.items()}
    complaints = []
    for isa, call in sorted(found.keys() | known.keys()):
        now, before = found.get((isa, call)), known.get((isa, call))
        if now is None or before is None:
            complaints.append(f"{isa} {call}: {'gone' if now is None else 'new'}")
        elif now > before * (1 + ALLOWED):
            complaints.append(
                f"{isa} {call}: {now:,} instructions, {now / before - 1:+.1%} from {before:,}"
            )
    return complaints


def render(record: dict) -> str:
    """The committed counts as a Markdown table."""
    counts = record["counts"]
    calls = dict.fromkeys(call for of_isa in counts.values() for call in of_isa)
    rows = [
        (call, *(f"{of_isa[call]:,}" if call in of_isa else "-" for of_isa in counts.values()))
        for call in calls
    ]
    return (
        f"{markdown(('instructions of a call', *counts), rows)}\n\n{record['machine']}; "
        f"{record['compiler']}; {record['valgrind']}."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("--update", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args(argv)
    tool("valgrind")
    compiler = build()
    machine = platform.machine()
    counts = {isa: calls for isa in ("avx2", "baseline") if (calls := count(isa))}
    committed = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"counts": {}}
    print(f"{compiler}, {machine}")
    for isa, calls in counts.items():
        for call, n in calls.items():
            before = committed["counts"].get(isa, {}).get(call)
            change = f"{n / before - 1:+8.1%}" if before else ""
            print(f"{isa:9}{call:45}{n:>14,}{change}")
    if options.update:
        valgrind = run(tool("valgrind"), "--version").strip()
        facts = {"compiler": compiler, "machine": machine, "valgrind": valgrind}
        results.save(RESULTS, {**facts, "counts": counts})
        print(f"wrote {RESULTS}")
        return 0
    there = committed.get("compiler"), committed.get("machine")
    if there != (compiler, machine):
        print(f"not compared: the committed counts are of {there[0]}, {there[1]}")
        return 0
    complaints = compare(counts, committed["counts"])
    print("\n".join(complaints) or "no call takes more than 1 % more instructions than committed")
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())

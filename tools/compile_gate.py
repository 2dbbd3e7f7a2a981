"""Compiles every Triton kernel under every launch setting for chips that need not be here.

    python -m tools.compile_gate                        # all families, all chips
    python -m tools.compile_gate --families adaln --architectures 90
    python -m tools.compile_gate --only 'keys .*D=72 '
    python -m tools.compile_gate --changed              # what the table does not have, and a sample
    python -m tools.compile_gate --changed --output docs/compile-gate.json
    PYTHONPATH=build/triton-3.6.0 python -m tools.compile_gate --triton 3.6.0

The cases are those that a family's record names (ecar_kernels/<family>/compile_cases.py). One
fails where it does not compile, keeps a stack (its registers spilled to memory), needs more shared
or tensor memory than a block can have on the chip, where ptxas serialised its wgmma, or where it
touches memory before it waits for the kernel before it.

--output records registers, shared memory and the machine code's matrix instructions of what
passes, as it comes, in the JSON file (tools/gate_table.py) and at the end in the Markdown page of
the same name. --changed leaves out the cases whose entry in the table has the digest of what it
would be made from; without --output it compiles a sample of those, too, and fails where a case
differs from its entry or has none, or an entry no longer has a case.
Nothing is read from Triton's cache, nor left there.
"""

import argparse
import functools
import math
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

# Read by Triton when a kernel is defined; inherited from a test, it would interpret them.
os.environ.pop("TRITON_INTERPRET", None)

import triton

from ecar_kernels import _triton
from ecar_kernels._triton import CompileCase
from ecar_kernels.ops import load
from ecar_kernels.registry import DECLARED
from tools import gate_table
from tools.compile_case import INSTRUCTIONS, SHARED_KIB, Result, compile_case, digest
from tools.gate_table import Entry, Key

TABLE = Path(__file__).parent.parent / "docs" / "compile-gate.json"
SAVE_EVERY = 5.0  # seconds
SAMPLE = 0.03  # of the cases of a family on a chip
Case = tuple[str, int, int]  # family, chip, index among its cases
PACKAGE = Path(_triton.__file__).parent
FAMILIES = tuple(name for name, family in DECLARED.items() if family.compile_cases)
ARCHITECTURES = (80, 90, 100, 120)


@functools.cache
def cases(family: str, architecture: int) -> tuple[CompileCase, ...]:
    return tuple(load(DECLARED[family].compile_cases)(architecture))


def _compile_one(family: str, architecture: int, index: int) -> Result:
    """In a process of its own: kernels cannot be sent, so both sides list the cases."""
    return compile_case(family, cases(family, architecture)[index], architecture)


def compile_all(todo: list[Case], jobs: int) -> Iterator[Result]:
    """In the order of `todo`."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile_one, *zip(*todo, strict=True))


def listed(
    families: Sequence[str], architectures: Sequence[int], only: re.Pattern | None
) -> dict[Key, Case]:
    """Every case, in the order of the cases; or those alone whose names `only` is found in."""
    return {
        (family, case.name, architecture): (family, architecture, index)
        for family in families
        for architecture in architectures
        for index, case in enumerate(cases(family, architecture))
        if only is None or only.search(case.name)
    }


def changed(found: dict[Key, Case], entries: dict[Key, Entry]) -> list[Key]:
    """Those that have no entry, or one that was made from something else."""

    def now(key: Key) -> str:
        family, architecture, index = found[key]
        return digest(cases(family, architecture)[index], architecture)

    return [key for key in found if key not in entries or entries[key].digest != now(key)]


def sample(entries: dict[Key, Entry]) -> list[Key]:
    """Of each family on each chip some, always the same until they change: those whose digests
    are the least."""
    groups: dict[tuple[str, int], list[Key]] = {}
    for key in sorted(entries, key=lambda key: entries[key].digest):
        groups.setdefault((key[0], key[2]), []).append(key)
    return [key for keys in groups.values() for key in keys[: math.ceil(SAMPLE * len(keys))]]


def difference(result: Result, entry: Entry | None) -> str:
    """From the table's entry, in words; none where all is the same but the digest."""
    if entry is None:
        return "is not in the table"
    fields = [
        f"{field} {getattr(result, field)}, in the table {getattr(entry, field)}"
        for field in gate_table.FIELDS
        if field != "digest" and getattr(result, field) != getattr(entry, field)
    ]
    return "; ".join(fields)


def row(result: Result) -> str:
    """One line of the table."""
    instructions = " ".join(f"{key}:{count}" for key, count in (result.instructions or {}).items())
    return (
        f"{result.family:<16} sm_{result.architecture:<4} {result.name:<60} "
        f"{result.num_warps:>2}w {result.num_stages}s {result.registers:>4} regs "
        f"{result.shared_bytes / 1024:>6.1f} KiB  {instructions}"
        + (f"  FAILS: {result.problem}" if result.problem else "")
    )


def summary(results: list[Result]) -> list[str]:
    """A line for each family and chip: the most of everything, and the matrix instructions."""
    lines = []
    for family, architecture in dict.fromkeys((r.family, r.architecture) for r in results):
        its = [r for r in results if (r.family, r.architecture) == (family, architecture)]
        kinds = Counter(kind for r in its for kind in r.instructions or ())
        lines.append(
            f"{family:<16} sm_{architecture:<4} {len(its):>4} cases, at most "
            f"{max(r.registers for r in its)} registers, "
            f"{max(r.shared_bytes for r in its) / 1024:.1f} KiB shared"
            + "".join(f", {kinds[kind]} with {kind}" for kind in INSTRUCTIONS if kinds[kind])
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compile_gate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument(
        "--architectures",
        nargs="+",
        type=int,
        choices=tuple(SHARED_KIB),
        default=ARCHITECTURES,
        metavar="CC",
        help="80 90 100 120 by default",
    )
    parser.add_argument(
        "--only",
        type=re.compile,
        metavar="PATTERN",
        help="cases whose names this regular expression is found in",
    )
    parser.add_argument(
        "--changed",
        action="store_true",
        help="cases whose entry in the table is missing or out of date; without "
        "--output a sample of the others, too, and all against their entries",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--triton", metavar="VERSION", help="fail where another one is found")
    parser.add_argument("--quiet", action="store_true", help="print failures and the summary")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    given = parser.parse_args(argv)
    if given.triton is not None and triton.__version__ != given.triton:
        print(
            f"compile_gate: Triton {triton.__version__} was found, not {given.triton}",
            file=sys.stderr,
        )
        return 2
    compares = given.changed and given.output is None
    path = given.output or TABLE
    found = listed(given.families, given.architectures, given.only)
    if not found:
        raise SystemExit("compile_gate: no cases")
    try:
        table = gate_table.load(path) if given.changed or given.output is not None else {}
    except ValueError as error:
        raise SystemExit(f"compile_gate: {error}") from None
    entries = table.setdefault(triton.__version__, {})
    todo = changed(found, entries) if given.changed else list(found)
    if given.changed:
        print(
            f"Triton {triton.__version__}: {len(todo)} of {len(found)} cases are not in "
            f"{path.name} as they are now",
            flush=True,
        )
    if compares:
        todo += sample({key: entries[key] for key in found.keys() - set(todo)})

    begin = saved = time.perf_counter()
    results, failures = [], 0
    # Not those of other families and chips, nor names that --only leaves out.
    for key in [
        key
        for key in entries
        if key not in found
        and key[0] in given.families
        and key[2] in given.architectures
        and (given.only is None or given.only.search(key[1]))
    ]:
        if given.output is not None:
            del entries[key]
        elif compares:
            print(f"{key[0]:<16} sm_{key[2]:<4} {key[1]}  FAILS: in the table, but no case")
            failures += 1
    with tempfile.TemporaryDirectory(prefix="compile-gate-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # the processes inherit it
        for result in compile_all([found[key] for key in todo], given.jobs):
            if compares and not result.problem:
                result = replace(result, problem=difference(result, entries.get(result.key)))
            if result.problem or not given.quiet:
                print(row(result), flush=True)
            results.append(result)
            failures += bool(result.problem)
            if given.output is None:
                continue
            entries.pop(result.key, None)
            if not result.problem:
                entries[result.key] = result.entry
            if time.perf_counter() - saved > SAVE_EVERY:
                gate_table.save(path, table)
                saved = time.perf_counter()
    if given.output is not None:
        gate_table.save(path, table)
    if given.output is not None and any(table.values()):
        gate_table.write(path.with_suffix(".md"), gate_table.page(table))
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"Triton {triton.__version__}: {len(results)} compiled, {failures} fail; "
        f"{time.perf_counter() - begin:.0f} s on {given.jobs} processes, "
        f"{usage.ru_utime + usage.ru_stime:.0f} s of CPU time"
    )
    for line in summary([result for result in results if result.registers]):
        print(line)
    if compares and failures:
        print(
            f"{path.name} is made again by make compile-gate-changed "
            "GATE='--output docs/compile-gate.json'"
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

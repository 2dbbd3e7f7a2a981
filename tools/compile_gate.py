"""Compiles every Triton kernel under every launch setting for chips that need not be here.

    python -m tools.compile_gate                        # all families, all chips
    python -m tools.compile_gate --families adaln --architectures 90
    python -m tools.compile_gate --only 'keys .*D=72 '
    python -m tools.compile_gate --changed              # what the table does not have, and a sample
    python -m tools.compile_gate --changed --output docs/compile-gate.json
    PYTHONPATH=build/triton-3.6.0 python -m tools.compile_gate --triton 3.6.0

The cases are those that a family's record names (ecar_kernels/<family>/compile_cases.py). One
fails where it does not compile, keeps a stack (its registers spilled to memory), needs more shared
or tensor memory than a block can have on the chip, or where ptxas serialised its wgmma.

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
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

# Read by Triton when a kernel is defined; inherited from a test, it would interpret them.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import ASTSource

from ecar_kernels import _triton
from ecar_kernels._triton import CompileCase
from ecar_kernels.ops import load
from ecar_kernels.registry import DECLARED
from tools import gate_table
from tools.gate_table import Entry, Key

TABLE = Path(__file__).parent.parent / "docs" / "compile-gate.json"
SAVE_EVERY = 5.0  # seconds
SAMPLE = 0.03  # of the cases of a family on a chip
Case = tuple[str, int, int]  # family, chip, index among its cases
PACKAGE = Path(_triton.__file__).parent
FAMILIES = tuple(name for name, family in DECLARED.items() if family.compile_cases)
# Shared memory that one block may have, in KiB (CUDA C++ Programming Guide, compute capabilities).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
ARCHITECTURES = (80, 90, 100, 120)
TENSOR_MEMORY_COLUMNS = 512
# Matrix units: warp level, Hopper's warp group, Blackwell's tensor memory; FFMA is none of them.
# ARRIVE: a group of HGMMA begins.
INSTRUCTIONS = ("UTCHMMA", "HGMMA", "ARRIVE", "HMMA", "FFMA", "FFMA2")
OPCODE = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?:WARPGROUP\.)?([A-Z][A-Z0-9]*)", re.MULTILINE
)


@dataclass(frozen=True)
class Result:
    """What one compiled case takes of the chip; `problem` is empty where it passes."""

    family: str
    name: str
    architecture: int
    num_warps: int
    num_stages: int
    max_registers: int | None  # that the launch allows a thread; None leaves it to ptxas
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    instructions: dict[str, int] | None = None
    digest: str = ""
    problem: str = ""

    @property
    def key(self) -> Key:
        return self.family, self.name, self.architecture

    @property
    def entry(self) -> Entry:
        return Entry(*(getattr(self, field) for field in gate_table.FIELDS))


def compile_case(family: str, case: CompileCase, architecture: int) -> Result:
    """Compile it as a launch on that chip would, and look at the machine code."""
    head = (family, case.name, architecture, case.num_warps, case.num_stages, case.max_registers)
    try:
        kernel = triton.compile(
            source(case), target=GPUTarget("cuda", architecture, 32), options=options(case)
        )
    except Exception as error:  # whatever the compiler finds wrong, the other cases go on
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Result(*head, problem=f"does not compile: {text[:300]}")
    # Disassembling may take longer than compiling: not where no matrices are multiplied.
    said = disassembled(kernel.asm["cubin"], "tt.dot" in kernel.asm["ttir"])
    registers, stack, instructions = machine_code(said)
    shared = kernel.metadata.shared
    problems = []
    if stack:
        problems.append(f"spills registers: {stack} bytes of stack a thread")
    if shared > 1024 * SHARED_KIB[architecture]:
        problems.append(
            f"needs {shared / 1024:.1f} KiB of shared memory, "
            f"a block has {SHARED_KIB[architecture]}"
        )
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    if columns > TENSOR_MEMORY_COLUMNS:
        problems.append(
            f"needs {columns} columns of tensor memory, a block has {TENSOR_MEMORY_COLUMNS}"
        )
    if serialised(kernel.asm["ptx"], said):
        problems.append(
            f"wgmma is serialised: {instructions['HGMMA']} HGMMA, each waited for before the next"
        )
    return Result(
        *head,
        registers,
        stack,
        shared,
        instructions,
        digest(case, architecture),
        "; ".join(problems),
    )


def serialised(ptx: str, machine_code: str) -> bool:
    """Did ptxas make each wgmma wait for the one before it?

    Where it cannot tell which registers a wgmma in flight uses, it does so in the whole kernel
    (advisory C7515, which some versions do not print): each HGMMA gets an ARRIVE and a wait for
    all, DEPBAR 0. The PTX says what was meant: a group of wgmma begins with a fence, which is one
    ARRIVE, and a wait may leave the last groups in flight. So kernels are serialised that have
    groups of several wgmma in the PTX and an ARRIVE for each in the machine code, or waits that
    leave some in flight in the PTX alone. Where each group has one wgmma in the PTX, too, as of 16
    inner dimensions, equal counts are right; counts of both are not compared with each other,
    for ptxas unrolls loops.

    UTCHMMA cannot be serialised so: its sums are not in registers but in tensor memory, it is
    queued in order, and the only waits are Triton's own (UTCBAR, one for each group).
    """
    opcodes = Counter(OPCODE.findall(machine_code))
    if not opcodes["HGMMA"]:
        return False
    grouped = ptx.count("wgmma.fence") < ptx.count("wgmma.mma_async")
    overlapped = re.search(r"wgmma\.wait_group\S* [1-9]", ptx)
    return bool(
        (grouped and opcodes["ARRIVE"] >= opcodes["HGMMA"])
        or (overlapped and not re.search(r"DEPBAR\.LE gsb0, 0x[1-9a-f]", machine_code))
    )


def digest(case: CompileCase, architecture: int) -> str:
    """Of all that an entry is made from: kernel, case, compiler, and what is counted."""
    return gate_table.digest(
        gate_table.kernel_digest(case.kernel),
        list(_arguments(case).items()),
        case.constants,
        sorted(case.aligned),
        options(case),
        architecture,
        triton.__version__,
        assembler(architecture),
        INSTRUCTIONS,
    )


@functools.cache
def assembler(architecture: int) -> str:
    """The version of ptxas; Triton has more than one."""
    return re.search(r"V[\d.]+", get_ptxas_version(architecture))[0]


def options(case: CompileCase) -> dict:
    """What the launch passes on to the compiler."""
    given = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return given if case.max_registers is None else given | {"maxnreg": case.max_registers}


def source(case: CompileCase) -> ASTSource:
    """The case as the compiler takes it: arguments in the kernel's order, alignment by index."""
    listed = _arguments(case)
    names = list(listed)
    if missing := {name for name in names if listed[name] == "constexpr"} - set(case.constants):
        raise ValueError(f"case {case.name!r}: no value for {sorted(missing)}")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    return ASTSource(fn=case.kernel, signature=listed, constexprs=case.constants, attrs=aligned)


def _arguments(case: CompileCase) -> dict[str, str]:
    """Kinds in the kernel's order."""
    names = case.kernel.arg_names
    listed = case.signature | dict.fromkeys(case.constants, "constexpr")
    if set(listed) != set(names):
        raise ValueError(
            f"case {case.name!r}: the kernel's arguments are {sorted(names)}, "
            f"the case has {sorted(listed)}"
        )
    return {name: listed[name] for name in names}


def disassembled(cubin: bytes, disassemble: bool) -> str:
    """What cuobjdump says of its resources, and of its instructions where asked."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        asked = ["-res-usage", *(["-sass"] if disassemble else [])]
        said = subprocess.run(
            [cuobjdump(), *asked, file.name], capture_output=True, text=True, check=True
        ).stdout
    if bool(OPCODE.search(said)) != disassemble:
        raise RuntimeError(f"cuobjdump's output is not understood: {said[:1000]}")
    return said


def machine_code(said: str) -> tuple[int, int, dict[str, int]]:
    """Registers and bytes of stack of a thread, and how often the instructions of note occur."""
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    if usage.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump's output is not understood: {said[:1000]}")
    found = Counter(OPCODE.findall(said))
    counts = {name: found[name] for name in INSTRUCTIONS if found[name]}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], counts


@functools.cache
def cuobjdump() -> str:
    """The program that comes with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.is_file():
        raise FileNotFoundError(f"Triton {triton.__version__} comes without {path}")
    return str(path)


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

"""Compiles every Triton kernel under every launch setting for chips that need not be here.

    python -m tools.compile_gate                        # all families, all chips
    python -m tools.compile_gate --families adaln --architectures 90
    python -m tools.compile_gate --only 'keys .*D=72 '
    PYTHONPATH=build/triton-3.6.0 python -m tools.compile_gate --triton 3.6.0

The cases are those that ecar_kernels/<family>/compile_cases.py yields. One fails where it does
not compile, keeps a stack (its registers spilled to memory), or needs more shared or tensor
memory than a block can have on the chip. --output records registers, shared memory and the
machine code's matrix instructions as JSON, with a Markdown page beside it: whole families on all
chips, in place of what this Triton had there. Nothing is read from Triton's cache, nor left there.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

# Read by Triton when a kernel is defined; inherited from a test, it would interpret them.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ecar_kernels import _triton
from ecar_kernels._triton import CompileCase

PACKAGE = Path(_triton.__file__).parent
FAMILIES = tuple(sorted(path.parent.name for path in PACKAGE.glob("*/compile_cases.py")))
# Shared memory that one block may have, in KiB (CUDA C++ Programming Guide, compute capabilities).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
ARCHITECTURES = (80, 90, 100, 120)
TENSOR_MEMORY_COLUMNS = 512
# Matrix units: warp level, Hopper's warp group, Blackwell's tensor memory; FFMA is none of them.
INSTRUCTIONS = ("UTCHMMA", "HGMMA", "HMMA", "FFMA", "FFMA2")
OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)


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
    problem: str = ""
    seconds: float = 0.0


def compile_case(family: str, case: CompileCase, architecture: int) -> Result:
    """Compile it as a launch on that chip would, and look at the machine code."""
    begin = time.perf_counter()
    head = (family, case.name, architecture, case.num_warps, case.num_stages,
            case.max_registers)
    try:
        kernel = triton.compile(
            source(case),
            target=GPUTarget("cuda", architecture, 32),
            options=options(case),
        )
    except Exception as error:  # whatever the compiler finds wrong, the other cases go on
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Result(*head, problem=f"does not compile: {text[:300]}",
                      seconds=time.perf_counter() - begin)
    # Disassembling may take longer than compiling: not where no matrices are multiplied.
    registers, stack, instructions = machine_code(kernel.asm["cubin"],
                                                  disassemble="tt.dot" in kernel.asm["ttir"])
    shared = kernel.metadata.shared
    problems = []
    if stack:
        problems.append(f"spills registers: {stack} bytes of stack a thread")
    if shared > 1024 * SHARED_KIB[architecture]:
        problems.append(f"needs {shared / 1024:.1f} KiB of shared memory, "
                        f"a block has {SHARED_KIB[architecture]}")
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    if columns > TENSOR_MEMORY_COLUMNS:
        problems.append(f"needs {columns} columns of tensor memory, "
                        f"a block has {TENSOR_MEMORY_COLUMNS}")
    return Result(*head, registers, stack, shared, instructions, "; ".join(problems),
                  time.perf_counter() - begin)


def options(case: CompileCase) -> dict:
    """What the launch passes on to the compiler."""
    given = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return given if case.max_registers is None else given | {"maxnreg": case.max_registers}


def source(case: CompileCase) -> ASTSource:
    """The case as the compiler takes it: arguments in the kernel's order, alignment by index."""
    names = case.kernel.arg_names
    listed = case.signature | dict.fromkeys(case.constants, "constexpr")
    if set(listed) != set(names):
        raise ValueError(f"case {case.name!r}: the kernel's arguments are {sorted(names)}, "
                         f"the case has {sorted(listed)}")
    if missing := {name for name in names if listed[name] == "constexpr"} - set(case.constants):
        raise ValueError(f"case {case.name!r}: no value for {sorted(missing)}")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    return ASTSource(fn=case.kernel, signature={name: listed[name] for name in names},
                     constexprs=case.constants, attrs=aligned)


def machine_code(cubin: bytes, disassemble: bool) -> tuple[int, int, dict[str, int]]:
    """Registers and bytes of stack of a thread, and how often the instructions of note occur."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        asked = ["-res-usage", *(["-sass"] if disassemble else [])]
        said = subprocess.run([cuobjdump(), *asked, file.name], capture_output=True, text=True,
                              check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    found = Counter(OPCODE.findall(said))
    if usage.keys() != {"REG", "STACK", "LOCAL"} or bool(found) != disassemble:
        raise RuntimeError(f"cuobjdump's output is not understood: {said[:1000]}")
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
    module = importlib.import_module(f"ecar_kernels.{family}.compile_cases")
    return tuple(module.compile_cases(architecture))


def _compile_one(family: str, architecture: int, index: int) -> Result:
    """In a process of its own: kernels cannot be sent, so both sides list the cases."""
    return compile_case(family, cases(family, architecture)[index], architecture)


def compile_all(families: tuple[str, ...], architectures: tuple[int, ...], jobs: int,
                only: re.Pattern | None = None) -> Iterator[Result]:
    """Every case, in the order of the cases; or those alone whose names `only` is found in."""
    todo = [(family, architecture, index) for family in families for architecture in architectures
            for index, case in enumerate(cases(family, architecture))
            if only is None or only.search(case.name)]
    if not todo:
        raise SystemExit("compile_gate: no cases")
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile_one, *zip(*todo, strict=True))


def row(result: Result) -> str:
    """One line of the table."""
    instructions = " ".join(f"{key}:{count}" for key, count in (result.instructions or {}).items())
    return (f"{result.family:<16} sm_{result.architecture:<4} {result.name:<60} "
            f"{result.num_warps:>2}w {result.num_stages}s {result.registers:>4} regs "
            f"{result.shared_bytes / 1024:>6.1f} KiB  {instructions}"
            + (f"  FAILS: {result.problem}" if result.problem else ""))


def summary(results: list[Result]) -> list[str]:
    """A line for each family and chip: the most of everything, and the matrix instructions."""
    lines = []
    for family, architecture in dict.fromkeys((r.family, r.architecture) for r in results):
        its = [r for r in results if (r.family, r.architecture) == (family, architecture)]
        kinds = Counter(kind for r in its for kind in r.instructions or ())
        lines.append(f"{family:<16} sm_{architecture:<4} {len(its):>4} cases, at most "
                     f"{max(r.registers for r in its)} registers, "
                     f"{max(r.shared_bytes for r in its) / 1024:.1f} KiB shared"
                     + "".join(f", {kinds[kind]} with {kind}" for kind in INSTRUCTIONS
                               if kinds[kind]))
    return lines


def record(path: Path, results: list[Result]) -> None:
    """Put this Triton's results, of whole families, into the JSON; rewrite the page beside it."""
    table = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    again = {result.family for result in results}
    entries = [entry for entry in table.get(triton.__version__, ())
               if entry["family"] not in again]
    entries += [
        {key: value for key, value in asdict(result).items() if key not in ("problem", "seconds")}
        for result in results
    ]
    table[triton.__version__] = sorted(entries, key=lambda entry: entry["family"])
    lines = []
    for version, rows in sorted(table.items()):
        entries = ",\n".join(f"  {json.dumps(entry)}" for entry in rows)
        lines.append(f"{json.dumps(version)}: [\n{entries}\n ]")
    _write(path, "{" + ",\n ".join(lines) + "}\n")
    _write(path.with_suffix(".md"), page(table))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def page(table: dict[str, list[dict]]) -> str:
    """The table of the newest Triton as Markdown, and a line on each older one."""
    versions = sorted(table, key=lambda version: [int(part) for part in version.split(".")[:3]])
    newest = versions[-1]
    lines = [
        "# What the Triton kernels take of each chip",
        "",
        "Made by `make compile-gate`, without a GPU: every kernel under every launch setting that",
        "the defaults can choose. A cell holds registers a thread, shared memory a block in KiB,",
        "and, where it multiplies matrices, the instructions for that: UTCHMMA (Blackwell's tensor",
        "memory), HGMMA (Hopper's warp groups), HMMA (one warp), or FFMA alone. The gate fails",
        "where a kernel spills registers. Nothing on this page is a time.",
        "",
    ]
    lines += [f"Triton {version}: {len(table[version])} compiled, most registers "
              f"{max(entry['registers'] for entry in table[version])}, most shared memory "
              f"{max(entry['shared_bytes'] for entry in table[version]) / 1024:.0f} KiB."
              for version in versions]
    architectures = sorted({entry["architecture"] for entry in table[newest]})
    for family in dict.fromkeys(entry["family"] for entry in table[newest]):
        of_case: dict[str, dict[int, str]] = {}
        for entry in table[newest]:
            if entry["family"] == family:
                of_case.setdefault(entry["name"], {})[entry["architecture"]] = _cell(entry)
        lines += ["", f"## {family} (Triton {newest})", "",
                  "| case | " + " | ".join(f"sm_{a}" for a in architectures) + " |",
                  "|---" * (1 + len(architectures)) + "|"]
        lines += [f"| {name} | " + " | ".join(cells.get(a, "") for a in architectures) + " |"
                  for name, cells in of_case.items()]
    return "\n".join(lines) + "\n"


def _cell(entry: dict) -> str:
    kinds = [kind for kind in entry["instructions"] if not kind.startswith("FFMA")]
    multiplies = "+".join(kinds) or ("FFMA" if entry["instructions"] else "")
    cell = f"{entry['registers']}, {entry['shared_bytes'] / 1024:.1f}"
    return f"{cell}, {multiplies}" if multiplies else cell


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compile_gate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--architectures", nargs="+", type=int, choices=tuple(SHARED_KIB),
                        default=ARCHITECTURES, metavar="CC", help="80 90 100 120 by default")
    parser.add_argument("--only", type=re.compile, metavar="PATTERN",
                        help="cases whose names this regular expression is found in")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--triton", metavar="VERSION", help="fail where another one is found")
    parser.add_argument("--quiet", action="store_true", help="print failures and the summary")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    given = parser.parse_args(argv)
    if given.triton is not None and triton.__version__ != given.triton:
        print(f"compile_gate: Triton {triton.__version__} was found, not {given.triton}",
              file=sys.stderr)
        return 2
    if given.output is not None and set(given.architectures) != set(ARCHITECTURES):
        print("compile_gate: --output records all chips, leave --architectures out",
              file=sys.stderr)
        return 2
    if given.output is not None and given.only is not None:
        print("compile_gate: --output records whole families, leave --only out", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    results = []
    with tempfile.TemporaryDirectory(prefix="compile-gate-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # the processes inherit it
        for result in compile_all(tuple(given.families), tuple(given.architectures), given.jobs,
                                  given.only):
            if result.problem or not given.quiet:
                print(row(result), flush=True)
            results.append(result)
    failed = [result for result in results if result.problem]
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"Triton {triton.__version__}: {len(results)} compiled, {len(failed)} fail; "
          f"{time.perf_counter() - begin:.0f} s on {given.jobs} processes, "
          f"{usage.ru_utime + usage.ru_stime:.0f} s of CPU time")
    if len(failed) < len(results):
        for line in summary(results):
            print(line)
    if given.output is not None and not failed:
        record(given.output, results)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

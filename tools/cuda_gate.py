"""Compiles the CUDA C++ kernels for chips that need not be here, and looks at the machine code.

    python -m tools.cuda_gate            # all chips, the table to docs/cuda-gate.md
    python -m tools.cuda_gate --changed  # one chip, where that table is of these sources

The page has a digest of the sources, the flags and the compiler. Where that is what it would be
now, --changed compiles for one chip, else for all; it writes nothing, and fails where nvcc is the
page's and a kernel's row is another one.

Fails where a kernel spills registers; where, from sm_90 on, it does not wait for the kernel before
it, or touches memory earlier but by a prefetch; or where the machine code of a kernel for aligned
rows has no 128-bit load or no 128-bit store, or flow_boundary's too few loads for its two weights.
Skips, with the reason, where nvcc is missing, and the look at the machine code where cuobjdump
(Triton's package brings one) is.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ecar_kernels._triton import DEPENDENT_ARCHITECTURE

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "flow_step.cu"
INCLUDES = (ROOT / "csrc", ROOT / "csrc" / "include")
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", "-cubin")
CHIPS = ("sm_80", "sm_90", "sm_100", "sm_120")
SAMPLE = ("sm_90",)
INFO = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass
class Row:
    """One kernel on one chip; `problem` is empty where it passes."""

    chip: str
    kernel: str
    registers: int
    stack: int
    spills: int
    loads: int | None = None  # of 128 bits; None: no cuobjdump
    stores: int | None = None
    problem: str = ""


def find(name: str) -> str | None:
    if found := shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin"):
        return found
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.is_file() else None


def readable(symbol: str) -> str:
    """`upsample_renoise bfloat16 wide` of a kernel's symbol."""
    name = re.search(r"\d+([a-z_]+)_kernel", symbol)
    arguments = symbol[name.end() :]
    types = re.findall(r"BFloat16|Float16|(?<=I)f|(?<=E)f(?=L)|S\d?_(?=Li)", arguments)
    said = [
        {"BFloat16": "bfloat16", "Float16": "float16", "f": "float32"}.get(kind, "same state")
        for kind in types
    ]
    wide = re.findall(r"Lb([01])E", arguments)
    sizes = re.findall(r"Li(\d+)E", arguments)
    said += ["wide" if flag == "1" else "any layout" for flag in wide]
    if sizes:
        said += [f"{sizes[0]} tokens", "guided" if sizes[1] == "2" else "plain"]
    return " ".join((name[1], *said))


def machine_code(cuobjdump: str, cubin: Path) -> dict[str, str]:
    """Of each kernel."""
    text = subprocess.run(
        [cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    parts = re.split(r"Function : (\w+)", text)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def accesses(code: str) -> tuple[int, int]:
    """128-bit global loads and stores in machine code."""
    loads, stores = (
        len(re.findall(rf"\b{kind}\.E\.(?:\w+\.)*128\b", code)) for kind in ("LDG", "STG")
    )
    return loads, stores


def touches_memory_early(code: str) -> bool:
    """Has it no griddepcontrol.wait, ACQBULK, or an access to memory before that?"""
    before, waits, _ = code.partition("ACQBULK")
    return not waits or bool(re.search(r"\b(LDG|STG|LD|ST|ATOM|ATOMG|RED|REDG|LDGSTS)\b", before))


def compile_for(chip: str, nvcc: str, cuobjdump: str | None, folder: Path) -> Iterator[Row]:
    cubin = folder / f"{chip}.cubin"
    done = subprocess.run(
        [
            nvcc,
            *FLAGS,
            f"-arch={chip}",
            *(f"-I{folder}" for folder in INCLUDES),
            SOURCE,
            "-o",
            cubin,
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"{chip}: {done.stdout}{done.stderr}")
    seen = machine_code(cuobjdump, cubin) if cuobjdump else {}
    for found in INFO.finditer(done.stderr + done.stdout):
        row = Row(
            chip,
            readable(found["name"]),
            int(found["registers"]),
            int(found["stack"]),
            int(found["stores"]) + int(found["loads"]),
        )
        if row.spills or row.stack:
            row.problem = "registers spill or a stack is kept"
        if found["name"] in seen:
            row.loads, row.stores = accesses(seen[found["name"]])
            loads = 0 if row.kernel.startswith("initial_noise") else 2
            boundary = row.kernel.startswith("flow_boundary")  # reads its two weights so
            if (row.kernel.endswith("wide") and (row.loads < loads or not row.stores)) or (
                boundary and row.loads < loads
            ):
                row.problem = "128-bit loads or stores are missing"
            if int(chip.removeprefix("sm_")) >= DEPENDENT_ARCHITECTURE and touches_memory_early(
                seen[found["name"]]
            ):
                row.problem = "touches memory before it waits for the kernel before it"
        yield row


def digest() -> str:
    """Of the source, the headers of ours that it takes in, and the flags."""
    found, todo = {}, [SOURCE]
    while todo:
        path = todo.pop()
        text = found[path.relative_to(ROOT).as_posix()] = path.read_text("utf-8")
        for name in re.findall(r'^#\s*include\s+"([^"]+)"', text, re.MULTILINE):
            header = next(folder / name for folder in INCLUDES if (folder / name).is_file())
            if header.relative_to(ROOT).as_posix() not in found:
                todo.append(header)
    text = json.dumps([found, FLAGS], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def cell(row: Row) -> str:
    """Registers, and in brackets 128-bit loads and stores."""
    loads, stores = ("-" if n is None else n for n in (row.loads, row.stores))
    spilled = f", {row.stack} stack, {row.spills} spilled" if row.stack or row.spills else ""
    return f"{row.registers} ({loads}, {stores}){spilled}"


def page(rows: list[Row], compiler: str) -> str:
    chips = list(dict.fromkeys(row.chip for row in rows))
    found = {(row.kernel, row.chip): cell(row) for row in rows}
    return "\n".join(
        [
            "# CUDA C++ kernels: the compile gate",
            "",
            f"`make cuda-gate`; {compiler}; sources {digest()}. Compiled, not run. A cell holds "
            'registers and, in brackets, 128-bit loads and stores. "wide" is the kernel for rows '
            "that begin on 16 bytes. The gate fails if a kernel spills registers or, from sm_90 "
            "on, touches memory before it waits for the kernel before it.",
            "",
            f"| kernel | {' | '.join(chips)} |",
            "|---" * (len(chips) + 1) + "|",
            *(
                f"| {kernel} | {' | '.join(found.get((kernel, chip), '') for chip in chips)} |"
                for kernel in sorted({row.kernel for row in rows})
            ),
            "",
        ]
    )


def recorded_cells(text: str) -> dict[tuple[str, str], str]:
    """A page's cells by kernel and chip."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    _, *chips = (name.strip() for name in lines[0].strip("|").split("|")) if lines else ("",)
    found = {}
    for line in lines[1:]:
        kernel, *cells = (text.strip() for text in line.strip("|").split("|"))
        found |= {(kernel, chip): cell for chip, cell in zip(chips, cells, strict=True)}
    return found


def differences(rows: list[Row], recorded: str) -> list[str]:
    """What is not as on the page, of these rows' chips, both ways."""
    chips = {row.chip for row in rows}
    before = {key: text for key, text in recorded_cells(recorded).items() if key[1] in chips}
    now = {(row.kernel, row.chip): cell(row) for row in rows}
    return [
        f"{kernel} {chip}: {before.get((kernel, chip), 'none')} on the page, "
        f"{now.get((kernel, chip), 'none')} here"
        for kernel, chip in sorted(before.keys() | now.keys())
        if before.get((kernel, chip)) != now.get((kernel, chip))
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "cuda-gate.md")
    parser.add_argument("--chips", nargs="+", default=CHIPS)
    parser.add_argument(
        "--changed",
        action="store_true",
        help="compare with the page; one chip where its digest has not changed",
    )
    options = parser.parse_args(arguments)
    nvcc, cuobjdump = find("nvcc"), find("cuobjdump")
    if nvcc is None:
        print("cuda-gate: skipped, nvcc was not found")
        return 0
    if cuobjdump is None:
        print("cuda-gate: no cuobjdump, the machine code is not looked at")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release \S+, (V\S+)", version)
    compiler = f"nvcc {version[1] if version else 'of unknown version'}"
    path, chips, recorded = options.output, options.chips, ""
    if options.changed:
        recorded = path.read_text("utf-8")
        if f"; {compiler}; sources {digest()}." in recorded:
            chips = SAMPLE
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda chip: list(compile_for(chip, nvcc, cuobjdump, Path(folder))), chips)
        rows = [row for rows in found for row in sorted(rows, key=lambda row: row.kernel)]
    bad = [f"{row.chip} {row.kernel}: {row.problem}" for row in rows if row.problem]
    if not options.changed:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(page(rows, compiler), "utf-8")
        temporary.replace(path)
    elif cuobjdump and f"; {compiler};" in recorded:
        bad += differences(rows, recorded)
    else:
        print(
            f"cuda-gate: not compared with {path.name}: "
            + (f"it is not of {compiler}" if cuobjdump else "no cuobjdump")
        )
    print(*bad, sep="\n", end="\n" * bool(bad), file=sys.stderr)
    print(f"cuda-gate: {len(rows)} kernels on {' '.join(chips)}, {len(bad)} with a problem; {path}")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

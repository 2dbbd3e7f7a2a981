"""One Triton kernel under one launch setting, compiled for a chip that need not be here, and what
its machine code says: for tools/compile_gate.py.
"""

import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Read by Triton when a kernel is defined; inherited from a test, it would interpret them.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import ASTSource

from ecar_kernels._triton import CompileCase
from tools import gate_table
from tools.gate_table import Entry, Key

# Shared memory that one block may have, in KiB (CUDA C++ Programming Guide, compute capabilities).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
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
    if touches_memory_early(kernel.asm["ptx"]):
        problems.append("touches memory before it waits for the kernel before it")
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


def touches_memory_early(ptx: str) -> bool:
    """Of a dependent launch: is there an access but a prefetch before griddepcontrol.wait?"""
    before, waits, _ = ptx.partition("griddepcontrol.wait")
    early = re.search(r"\b(ld|st|atom|red)\.\S*global|\bcp\.(async|reduce)", before)
    return bool(waits and early)


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

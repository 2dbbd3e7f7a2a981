"""The compile gate fails what it must, and its cases and committed table miss no kernel.

Kernels are compiled in a process of their own: Triton interprets those that are defined here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "compile-gate.json"
VERSIONS = json.loads(TABLE.read_text("utf-8")) if TABLE.is_file() else {}

COMPILED = '''
import json
from dataclasses import asdict, replace

import triton
import triton.language as tl

from ecar_kernels._triton import CompileCase
from tools.compile_gate import compile_case


@triton.jit
def share(x, y, BLOCK: tl.constexpr):
    """All of a row is needed after its sum is: it stays in registers."""
    at = tl.arange(0, BLOCK)
    row = tl.load(x + at)
    tl.store(y + at, row / tl.sum(row))


@triton.jit
def product(x, y, out, steps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    at = at[:, None] * BLOCK + at[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(steps):
        total += tl.dot(tl.load(x + at), tl.load(y + at))
        x += BLOCK * BLOCK
        y += BLOCK * BLOCK
    tl.store(out + at, total)


@triton.jit
def wrong(x, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 1, "of another size")


row = CompileCase("row", share, {"x": "*fp32", "y": "*fp32", "BLOCK": "constexpr"},
                  {"BLOCK": 1024}, num_warps=4, aligned=("x", "y"))
signature = {"x": "*fp16", "y": "*fp16", "out": "*fp32", "steps": "i32", "BLOCK": "constexpr"}
tile = CompileCase("tile", product, signature, {"BLOCK": 128}, num_warps=8, num_stages=2,
                   aligned=("x", "y", "out"))
cases = {
    "right": (row, 80),
    "spills": (replace(row, constants={"BLOCK": 16384}, num_warps=1, max_registers=64), 80),
    "multiplies": (tile, 80),
    "shared": (replace(tile, num_stages=6), 80),
    "fails": (CompileCase("wrong", wrong, {"x": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 2}), 80),
    "unlisted": (replace(row, constants={}), 80),
}
print(json.dumps({name: asdict(compile_case("test", *case)) for name, case in cases.items()}))
'''

LISTED = '''
import importlib
import json
import triton
from tools.compile_gate import ARCHITECTURES, FAMILIES, PACKAGE, cases

found = {"families": FAMILIES, "kernels": {}, "compiled": {}, "cases": []}
for family in FAMILIES:
    modules = [importlib.import_module(f"ecar_kernels.{family}.{path.stem}")
               for path in PACKAGE.joinpath(family).glob("*kernels.py")]
    found["kernels"][family] = sorted(
        name for module in modules for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction) and not name.startswith("_"))
    found["compiled"][family] = sorted(
        {case.kernel.fn.__name__ for case in cases(family, ARCHITECTURES[0])})
    found["cases"] += [[family, case.name, arch, case.num_warps, case.num_stages,
                        case.max_registers]
                       for arch in ARCHITECTURES for case in cases(family, arch)]
print(json.dumps(found))
'''


def python(*arguments: str, **more: str) -> subprocess.CompletedProcess:
    """In the repository's root, with Triton's compiler; `more`: environment variables."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **more}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, text=True,
                          capture_output=True, check=False)


def printed(script: Path, source: str) -> dict:
    script.write_text(source, "utf-8")
    run = python(str(script), TRITON_CACHE_DIR=str(script.parent / "cache"))
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return printed(tmp_path_factory.mktemp("compiled") / "script.py", COMPILED)


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    return printed(tmp_path_factory.mktemp("listed") / "script.py", LISTED)


def test_what_fits_passes(compiled):
    right, multiplies = compiled["right"], compiled["multiplies"]
    assert right["problem"] == multiplies["problem"] == ""
    assert 0 < right["registers"] <= 255
    assert right["stack_bytes"] == multiplies["stack_bytes"] == 0
    assert right["instructions"] == {}
    assert multiplies["instructions"]["HMMA"] > 0
    assert multiplies["shared_bytes"] >= 2 * 128 * 128 * 2


def test_a_spill_is_caught(compiled):
    spills = compiled["spills"]
    assert spills["registers"] <= 64
    assert spills["stack_bytes"] > 0
    assert spills["problem"] == f"spills registers: {spills['stack_bytes']} bytes of stack a thread"


def test_too_much_shared_memory_is_caught(compiled):
    shared = compiled["shared"]
    assert shared["shared_bytes"] > 163 * 1024
    assert "KiB of shared memory, a block has 163" in shared["problem"]


def test_what_does_not_compile_or_is_listed_wrongly_is_caught(compiled):
    assert "of another size" in compiled["fails"]["problem"]
    assert "ValueError: case 'row'" in compiled["unlisted"]["problem"]


def test_every_kernel_has_a_case(listed):
    assert set(listed["families"]) == {"adaln", "flow_block", "stage_attention"}
    for family, kernels in listed["kernels"].items():
        assert kernels
        assert listed["compiled"][family] == kernels, family


def test_a_case_is_listed_once(listed):
    cases = [tuple(case) for case in listed["cases"]]
    assert len(set(cases)) == len(cases)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_committed_table_is_of_these_cases(listed, version):
    """Made anew by `make compile-gate GATE='--output docs/compile-gate.json'`."""
    fields = ("family", "name", "architecture", "num_warps", "num_stages",
              "max_registers")
    entries = VERSIONS[version]
    recorded = [[entry[field] for field in fields] for entry in entries]
    assert sorted(recorded, key=str) == sorted(listed["cases"], key=str)
    assert not any(entry["stack_bytes"] for entry in entries)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--triton", "0.1"), "was found, not 0.1"),
        (("--architectures", "90", "--output", "table.json"), "--output records all chips"),
        (("--only", "D=72", "--output", "table.json"), "--output records whole families"),
        (("--only", "no such case"), "no cases"),
    ],
)
def test_what_would_mislead_is_refused(arguments, message):
    run = python("-m", "tools.compile_gate", *arguments)
    assert run.returncode != 0
    assert message in run.stderr
    assert not (ROOT / "table.json").exists()

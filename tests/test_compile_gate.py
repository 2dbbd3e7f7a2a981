"""The compile gate fails what it must, and its cases and committed table miss no kernel.

Kernels are compiled in a process of their own: Triton interprets those that are defined here.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import gate_table

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "compile-gate.json"
VERSIONS = gate_table.load(TABLE)

# A script's beginning: a kernel, and a case of it that passes.
SHARE = '''
import json
from dataclasses import asdict, replace

import triton
import triton.language as tl

from ecar_kernels._triton import CompileCase


@triton.jit
def share(x, y, BLOCK: tl.constexpr):
    """All of a row is needed after its sum is: it stays in registers."""
    at = tl.arange(0, BLOCK)
    row = tl.load(x + at)
    tl.store(y + at, row / tl.sum(row))


row = CompileCase("row", share, {"x": "*fp32", "y": "*fp32", "BLOCK": "constexpr"},
                  {"BLOCK": 1024}, num_warps=4, aligned=("x", "y"))
'''

COMPILED = """
from tools.compile_case import compile_case
from tools.compile_gate import cases


@triton.jit
def product(x, y, out, steps, BLOCK: tl.constexpr, INNER: tl.constexpr):
    outer = tl.arange(0, BLOCK)
    inner = tl.arange(0, INNER)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(steps):
        left = tl.load(x + outer[:, None] * INNER + inner[None, :])
        total = tl.dot(left, tl.load(y + inner[:, None] * BLOCK + outer[None, :]), total)
        x += BLOCK * INNER
        y += BLOCK * INNER
    tl.store(out + outer[:, None] * BLOCK + outer[None, :], total)


@triton.jit
def wrong(x, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 1, "of another size")


signature = {"x": "*fp16", "y": "*fp16", "out": "*fp32", "steps": "i32"}
tile = CompileCase("tile", product, signature, {"BLOCK": 128, "INNER": 128}, num_warps=8,
                   num_stages=2, aligned=("x", "y", "out"))
attention, = (case for case in cases("stage_attention", 90)
              if case.name == "stage_attention bfloat16 D=64 64x64")
tried = {
    "right": (row, 80),
    "spills": (replace(row, constants={"BLOCK": 16384}, num_warps=1, max_registers=64), 80),
    "multiplies": (tile, 80),
    "shared": (replace(tile, num_stages=6), 80),
    "fails": (CompileCase("wrong", wrong, {"x": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 2}), 80),
    "unlisted": (replace(row, constants={}), 80),
    "grouped": (attention, 90),
    "serialised": (replace(attention, constants=attention.constants | {"PIPELINE_TAIL": True}), 90),
    # One wgmma multiplies 16 inner dimensions: as many ARRIVE as HGMMA, and nothing lost.
    "single": (replace(tile, constants={"BLOCK": 128, "INNER": 16}, num_stages=1), 90),
}
print(json.dumps({name: asdict(compile_case("test", *case)) for name, case in tried.items()}))
"""

LISTED = """
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
"""


def python(*arguments: str, **more: str) -> subprocess.CompletedProcess:
    """In the repository's root, with Triton's compiler; `more`: environment variables."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **more}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )


def printed(script: Path, source: str, *arguments: str) -> dict:
    script.write_text(source, "utf-8")
    run = python(str(script), *arguments, TRITON_CACHE_DIR=str(script.parent / "cache"))
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return printed(tmp_path_factory.mktemp("compiled") / "script.py", SHARE + COMPILED)


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


def test_serialised_wgmma_is_caught(compiled):
    serialised, grouped = compiled["serialised"], compiled["grouped"]
    count = serialised["instructions"]["HGMMA"]
    assert serialised["instructions"]["ARRIVE"] == count > 4
    assert serialised["problem"] == (
        f"wgmma is serialised: {count} HGMMA, each waited for before the next"
    )
    assert grouped["instructions"]["HGMMA"] == count
    assert grouped["instructions"]["ARRIVE"] == 4
    assert grouped["problem"] == ""


def test_groups_of_one_wgmma_pass(compiled):
    single = compiled["single"]
    assert single["instructions"]["ARRIVE"] == single["instructions"]["HGMMA"] > 0
    assert single["problem"] == ""


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
    """`make compile-gate-changed GATE='--output docs/compile-gate.json'` brings it up to date."""
    assert VERSIONS[version].keys() == {
        (family, name, chip) for family, name, chip, *_ in listed["cases"]
    }
    for family, name, chip, *settings in listed["cases"]:
        entry = VERSIONS[version][family, name, chip]
        assert [entry.num_warps, entry.num_stages, entry.max_registers] == settings, name
        groups, products = (entry.instructions.get(kind, 0) for kind in ("ARRIVE", "HGMMA"))
        # Strips of 16 columns and blocks of 16 queries are one wgmma each.
        single = name.startswith("stage_attention_keys") and name.endswith(" 16x64 unaligned")
        assert groups < products or groups == products in ((0, 4) if single else (0,)), name


def test_the_committed_page_sums_up_the_committed_table():
    text = TABLE.with_suffix(".md").read_text("utf-8")
    assert text == gate_table.page(VERSIONS)
    assert all(f"| {name} | " in text for name in ("adaln", "stage_attention_keys"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--triton", "0.1"), "was found, not 0.1"),
        (("--changed", "--output", "README.md"), "is no table of the compile gate"),
        (("--only", "no such case"), "no cases"),
    ],
)
def test_what_would_mislead_is_refused(arguments, message):
    run = python("-m", "tools.compile_gate", *arguments)
    assert run.returncode != 0
    assert message in run.stderr


CHANGED = '''
import contextlib
import io
import sys
from pathlib import Path

from tools import compile_gate as gate
from tools import gate_table

table = Path(sys.argv[1])
gate.TABLE = table
gate.compile_all = lambda todo, jobs: [gate._compile_one(*its) for its in todo]
a, b = replace(row, name="a"), replace(row, name="b")
spills = replace(row, name="spills", constants={"BLOCK": 16384}, num_warps=1, max_registers=64)
found = {}


def run(what, listed, *arguments):
    """What the gate says of these cases against the table as it is."""
    gate.cases = lambda family, chip: tuple(listed)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = gate.main(["--families", "adaln", "--architectures", "80", "--jobs", "1",
                          "--changed", *arguments])
    entries = gate_table.load(table).get(triton.__version__, {})
    found[what] = [code, said.getvalue(), sorted(key[1] for key in entries)]


def alter(**fields):
    known = gate_table.load(table)
    entries = known[triton.__version__]
    for key in entries:
        entries[key] = replace(entries[key], **fields)
    gate_table.save(table, known)


record = ("--output", str(table))
run("missing", [a])
run("recorded", [a, spills], *record)
run("of before", [a])
run("resumed", [a], *record)
run("other settings", [replace(a, num_warps=8)])
alter(digest="0" * 12)
run("same but for the digest", [a])
alter(registers=1)
run("other numbers", [a])
run("again", [a, b], *record)
run("no case", [b])
run("no case but left out", [b], "--only", "^b$")
run("removed", [b], *record)
alter(registers=1)
run("a sample's numbers", [b])
print(json.dumps(found))
'''


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed")
    return printed(folder / "script.py", SHARE + CHANGED, str(folder / "table.json"))


@pytest.mark.parametrize(
    ("what", "code", "said", "entries"),
    [
        ("missing", 1, "FAILS: is not in the table", []),
        ("recorded", 1, "FAILS: spills registers", ["a"]),
        ("of before", 0, "1 compiled, 0 fail", ["a"]),
        ("resumed", 0, "0 compiled, 0 fail", ["a"]),
        ("other settings", 1, "FAILS: num_warps 8, in the table 4", ["a"]),
        ("same but for the digest", 0, "1 of 1 cases are not in table.json as they are", ["a"]),
        ("other numbers", 1, "in the table 1", ["a"]),
        ("again", 0, "2 compiled, 0 fail", ["a", "b"]),
        ("no case", 1, "a  FAILS: in the table, but no case", ["a", "b"]),
        ("no case but left out", 0, "1 compiled, 0 fail", ["a", "b"]),
        ("removed", 0, "0 compiled, 0 fail", ["b"]),
        ("a sample's numbers", 1, "0 of 1 cases are not in table.json as they are", ["b"]),
    ],
)
def test_what_changed_is_compiled_and_compared(changed, what, code, said, entries):
    returned, printed_by_it, recorded = changed[what]
    assert said in printed_by_it
    assert (returned, recorded) == (code, entries), printed_by_it


MODULE = '''
import triton
import triton.language as tl

SIZE = tl.constexpr({size})
{more}

@triton.jit
def helper(x):
    """{words}"""
    return x * {factor}  # {words}


@triton.jit
def kernel(x, y, OTHER: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, helper(tl.load(x + at)) + tl.max(at))
'''
DIGESTS = """
import importlib
import json
import sys
from dataclasses import replace

from ecar_kernels._triton import CompileCase
from tools import compile_case

sys.path.insert(0, sys.argv[1])
found = {}
for name in sys.argv[2:]:
    kernel = importlib.import_module(name).kernel
    # As if all were versions of one module.
    kernel.__module__ = kernel.fn.__globals__["helper"].__module__ = "module"
    case = CompileCase("case", kernel, {"x": "*fp32", "y": "*fp32"}, {"OTHER": 1}, aligned=("x",))
    found[name] = compile_case.digest(case, 80)
    if name == "plain":
        found |= {
            "settings": compile_case.digest(replace(case, num_stages=4), 80),
            "constants": compile_case.digest(replace(case, constants={"OTHER": 2}), 80),
            "types": compile_case.digest(replace(case, signature={"x": "*bf16", "y": "*fp32"}), 80),
            "alignment": compile_case.digest(replace(case, aligned=("x", "y")), 80),
            "chip": compile_case.digest(case, 90),
        }
compile_case.assembler = lambda chip: "V0"
found["compiler"] = compile_case.digest(case, 80)
print(json.dumps(found))
"""


def test_a_digest_is_of_what_the_machine_code_depends_on(tmp_path):
    plain = {"size": 64, "more": "", "words": "Doubles.", "factor": 2}
    modules = {
        "plain": plain,
        "words": plain | {"words": "Twice it."},
        "moved": plain | {"more": "\n# Lines\n# further down."},
        "unread": plain | {"more": "UNREAD = 3"},
        "callee": plain | {"factor": 3},
        "read": plain | {"size": 128},
    }
    for name, its in modules.items():
        (tmp_path / f"{name}.py").write_text(MODULE.format(**its), "utf-8")
    found = printed(tmp_path / "script.py", DIGESTS, str(tmp_path), *modules)
    same = {"plain", "words", "moved", "unread"}
    assert {found[name] for name in same} == {found["plain"]}
    others = [digest for name, digest in found.items() if name not in same]
    assert len({found["plain"], *others}) == 1 + len(others) == 9


def test_code_is_written_alike_in_every_python():
    """Known answer: that of Python 3.10 to 3.13."""
    source = """def f(x, *, y: int = -1, **z):
    "A docstring."
    if x is None and 0 < y <= 2.5:
        return [i for i in range(3) if i] or (), {"a": True}, x[1:, None], f"{x:>3}"
    for _ in x: x += lambda: not y
    """
    text = gate_table.written(ast.parse(source))
    assert "docstring" not in text
    assert gate_table.digest(text) == "2ffe08edfe82"

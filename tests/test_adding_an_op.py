"""docs/adding-an-op.md is right: its steps are followed in a copy of the repository, and the tests,
tables and tools that read the ops' records know the new op, first with its reference alone, then
with its C++ backend."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ecar_kernels import _native

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adding-an-op.md"
FENCE = re.compile(r'^    ```(\w+) title="([^"]+)"\n(.*?)^    ```$', re.MULTILINE | re.DOTALL)
# What the op's files go into is copied; all else is read where it is.
COPIED = ("csrc", "ecar_kernels", "tests", "tools")
FILES = ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py")
DERIVED = """
import sys
import ecar_kernels
from benchmarks import cases
from ecar_kernels import costs, registry
from tests import smoke
from tools.update_docs import ROOT, ops, updated

assert "blend" in ecar_kernels.__all__ and "blend" in registry.OPS
smoke.every_op(sys.argv[1] == "compiled", ["blend"])
case = cases.Case("blend", 16, 2, "S", backward=True)
given = cases.inputs(case)
assert given["x"].shape == (2, 16, 768)
assert costs.cost("blend", given, given["x"]).bytes == 3 * 4 * given["x"].numel()
assert any(case.op == "blend" for case in cases.default())
page = ROOT / "docs" / "ops" / "blend.md"
assert "weight: a number in [0, 1]" in updated(page.read_text("utf-8"), page)
assert "| [`blend`](blend.md) | a blend of two streams of tokens | reference" in ops()
index = page.with_name("README.md")
index.write_text(updated(index.read_text("utf-8"), index), "utf-8")
"""
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")


def blocks() -> list[tuple[str, str, str]]:
    """(language, file, text) of the page's steps, in order."""
    found = FENCE.findall(PAGE.read_text("utf-8"))
    return [(kind, name, textwrap.dedent(text)) for kind, name, text in found]


def follow(tree: Path, steps: list[tuple[str, str, str]]) -> None:
    for kind, name, text in steps:
        path = tree / name
        if kind != "diff":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            continue
        content = path.read_text("utf-8")
        for change in text.split("\n\n"):
            lines = change.strip("\n").split("\n")
            old, new = (
                "\n".join(line[1:] for line in lines if line.startswith(sign)) for sign in "-+"
            )
            assert content.count(old) == 1, f"{name}: {old!r}"
            content = content.replace(old, new)
        path.write_text(content, "utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", ".*", "build")
    for name in COPIED:
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    shutil.copytree(
        ROOT / "docs", tree / "docs", ignore=shutil.ignore_patterns("images", "*-gate.*")
    )
    for name in ("benchmarks", "ecar", "examples"):
        (tree / name).symlink_to(ROOT / name)
    return tree


def run(tree: Path, *command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def check(tree: Path, backends: tuple[str, ...]) -> None:
    """The tests for all ops know it, and so does all else that reads the records."""
    table = [line.split() for line in run(tree, "-m", "ecar_kernels").splitlines()]
    (row,) = [row for row in table if row[:1] == ["blend"]]
    said = dict(zip(table[1], row, strict=True))
    assert [name for name, cell in said.items() if cell == "yes"] == [*backends]
    run(tree, "-c", DERIVED, "compiled" if "cpp" in backends else "plain")
    said = run(tree, "-m", "tests.fuzz", "--ops", "blend", "--cases", "150")
    valid, invalid = map(int, re.search(r"blend: (\d+) valid, (\d+) invalid", said).groups())
    assert valid > 30 and invalid > 30
    names = ("blend", "all_ops", "validation", "transforms", "compile")
    files = [f"tests/ecar_kernels/test_{name}.py" for name in names]
    passed = int(re.search(r"(\d+) passed", run(tree, *PYTEST, "-k", "blend", *files))[1])
    assert passed > 60
    run(tree, *PYTEST, "tests/test_docs.py::test_every_op_has_a_page_and_a_line")


@pytest.mark.slow
def test_with_its_reference_and_with_a_backend(tree):
    steps = blocks()
    places = {name.rpartition("/")[0] for _, name, _ in steps}
    assert places == {"ecar_kernels/blend", "tests/ecar_kernels", "docs/ops", "csrc/bindings"}
    backend = next(i for i, (kind, _, _) in enumerate(steps) if kind == "cpp")
    follow(tree, steps[:backend])
    check(tree, ("reference",))
    if _native.why_not() is not None or shutil.which("ninja") is None:
        pytest.skip(f"no C++ backend can be added here: {_native.why_not() or 'no ninja'}")
    follow(tree, steps[backend:])
    compile_library(tree)
    check(tree, ("reference", "cpp"))


def compile_library(tree: Path) -> None:
    """The real build of the op's file alone, in a library that takes the others' from the one that
    is built already: all of them would take minutes."""
    for path in (*tree.glob("csrc/bindings/*.cpp"), *tree.glob("csrc/cpu/*.cpp")):
        if path.name not in ("blend.cpp", "isa.cpp"):
            path.unlink()
    built = tree / "ecar_kernels" / "libecar_cpu.so"
    others = built.with_name("libecar_old.so")
    # The name that a linker takes down, too, so that it is no other library than the one to come.
    others.write_bytes(built.read_bytes().replace(b"libecar_cpu.so", b"libecar_old.so"))
    built.unlink()
    flags = f"-Wl,--no-as-needed {others} -Wl,-rpath,{others.parent}"
    flags += " -Wl,--unresolved-symbols=ignore-in-shared-libs"  # torch is in the process
    said = run(tree, "setup.py", "build_ext", "--inplace", LDFLAGS=flags, ECAR_REQUIRE_NATIVE="1")
    assert built.is_file(), said

"""Rules about the source tree that no single module can show (read, not imported)."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = sorted(
    path for package in ("ecar", "ecar_kernels") for path in ROOT.glob(f"{package}/**/*.py")
)
SOURCES = [
    *PRODUCT,
    *ROOT.glob("benchmarks/**/*.py"),
    *ROOT.glob("tests/**/*.py"),
    *ROOT.glob("tools/**/*.py"),
    *(
        path
        for suffix in ("h", "hpp", "cpp", "cu", "cuh")
        for path in ROOT.glob(f"csrc/**/*.{suffix}")
    ),
]
MAX_LINES = 400
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
# Kernels and what leads to them: an oracle that calls one would judge it by itself.
NOT_FOR_A_REFERENCE = {"api", "modules", "native", "registry", "triton"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imported_modules(path: Path) -> set[str]:
    """Absolute dotted names of everything the file imports, at any depth of its code."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def attribute_chain(node: ast.AST) -> str:
    """`torch.load` for the node of that expression; "" for anything but names and dots."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := attribute_chain(node.value)):
        return f"{base}.{node.attr}"
    return ""


def test_the_tree_is_found():
    assert {"ecar/config.py", "ecar_kernels/__init__.py"} <= {name(path) for path in PRODUCT}


def test_kernels_never_import_the_model():
    for path in ROOT.glob("ecar_kernels/**/*.py"):
        guilty = {m for m in imported_modules(path) if m == "ecar" or m.startswith("ecar.")}
        assert not guilty, f"{name(path)} imports {guilty}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("ecar_kernels/*/reference.py")), ids=name)
def test_a_reference_never_imports_a_kernel(path):
    """Nor does any module of ours that it imports, however indirectly."""
    seen, waiting = set(), [path]
    while waiting:
        current = waiting.pop()
        seen.add(current)
        for module in imported_modules(current):
            parts = module.split(".")
            assert parts[0] != "triton", f"{name(current)} imports {module}"
            if parts[0] != "ecar_kernels":
                continue
            assert not NOT_FOR_A_REFERENCE & set(parts), f"{name(current)} imports {module}"
            file = ROOT.joinpath(*parts).with_suffix(".py")
            if file.exists() and file not in seen:
                waiting.append(file)


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_no_pickle_in_the_product(path):
    guilty = {m for m in imported_modules(path) if m.split(".")[0] in PICKLES}
    assert not guilty, f"{name(path)} imports {guilty}"
    for node in ast.walk(tree(path)):
        chain = attribute_chain(node)
        assert chain not in {"torch.load", "torch.save"}, f"{name(path)}:{node.lineno}: {chain}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            value = node.value
            refused = isinstance(value, ast.Constant) and value.value is False
            assert refused, f"{name(path)}:{value.lineno}: allow_pickle is not False"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_stay_short(path):
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name(path)} has {lines} lines, at most {MAX_LINES} are allowed"

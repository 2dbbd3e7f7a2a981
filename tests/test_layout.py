"""Rules about the source tree that no single module can show (read, not imported)."""

import ast
import functools
import re
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
MAX_LINES = 660
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


def test_benchmarks_never_import_tests():
    for path in ROOT.glob("benchmarks/**/*.py"):
        guilty = {m for m in imported_modules(path) if m.split(".")[0] == "tests"}
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


# Functions of ecar/files.py whose blocks write under a temporary name, and name the file in errors.
SAFE_TO_WRITE_IN = {"atomic_folder", "atomic_path", "naming"}
WRITERS = {
    "SummaryWriter", "copyfile", "dump", "fdopen", "imsave", "mkdtemp", "mkstemp", "open",
    "save", "save_file", "save_model", "save_pretrained", "savefig", "savetxt", "savez",
    "savez_compressed", "serialize_file", "symlink_to", "tofile", "touch", "write_bytes",
    "write_text", "NamedTemporaryFile", "TemporaryDirectory",
    "os.rename", "os.replace", "shutil.copy", "shutil.copy2", "shutil.copytree", "shutil.move",
}  # fmt: skip
# Our own, which write by those functions.
ROUTED = {
    "codec.save", "model.save", "self.ema.module.save_pretrained", "self.model.save_pretrained",
}  # fmt: skip
# ecar_kernels can't import ecar: its one writer has a way of its own.
MAY_WRITE = {"ecar/files.py", "ecar_kernels/tuning.py"}


def writes(path: Path) -> list[str]:
    """Calls that write a file outside a block of ecar.files, as "function:line"."""
    found = []

    def look(node: ast.AST, safe: bool) -> None:
        if isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items]
            names = {attribute_chain(call.func) for call in calls if isinstance(call, ast.Call)}
            for call in calls:
                look(call, safe or bool(names & SAFE_TO_WRITE_IN))
            for inner in node.body:
                look(inner, safe or bool(names & SAFE_TO_WRITE_IN))
            return
        if isinstance(node, ast.Call) and not safe and is_write(node):
            found.append(f"{ast.unparse(node.func)}:{node.lineno}")
        for inner in ast.iter_child_nodes(node):
            look(inner, safe)

    look(tree(path), False)
    return found


def is_write(call: ast.Call) -> bool:
    text = ast.unparse(call.func)
    last = text.rpartition(".")[2]
    if not {text, last} & WRITERS or text in ROUTED:
        return False
    if last != "open":
        return True
    first = 0 if "." in text and text != "os.open" else 1  # of path.open, the mode
    words = " ".join(map(ast.unparse, [*call.args[first:], *(k.value for k in call.keywords)]))
    if text == "os.open":
        return "devnull" not in ast.unparse(call.args[0]) and bool(
            re.search("O_WRONLY|O_RDWR|O_CREAT", words)
        )
    return text != "Image.open" and bool(re.search(r"(['\"])[rbt]*[wax+][wbt+]*\1", words))


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_files_are_written_by_one_module(path):
    """Whole or not at all, and with errors that name them: ecar/files.py."""
    if name(path) in MAY_WRITE:
        assert writes(path), "nothing is written here any more: take it out of MAY_WRITE"
        return
    assert not writes(path)


def test_what_writes_is_seen(tmp_path):
    path = tmp_path / "x.py"
    for line in (
        "open(x, 'w')", "open(x, mode='ab')", "path.open('x')", "os.open(x, os.O_WRONLY)",
        "Path(x).write_text('')", "json.dump(x, f)", "torch.save(x, f)", "np.savez(f, x)",
        "image.save(x)", "shutil.copy(x, y)", "os.replace(x, y)", "vae.save_pretrained(x)",
        "with atomic_path(x) as y:\n    pass\nopen(y, 'w')", "with naming_of(x):\n    open(x, 'w')",
    ):  # fmt: skip
        path.write_text(line)
        tree.cache_clear()
        assert writes(path), line
    for line in (
        "open(x)", "open(x, 'rb')", "Image.open(x)", "text.replace('a', 'w')", "codec.save(x)",
        "with atomic_path(x) as y:\n    open(y, 'w')", "os.open(x, os.O_RDONLY)",
        "with atomic_path(x) as y, open(y, 'w') as z:\n    z.write('')",
    ):  # fmt: skip
        path.write_text(line)
        tree.cache_clear()
        assert not writes(path), line


def test_pictures_are_decoded_by_one_module():
    """ecar/images.py, which knows of EXIF, transparency and wide pixels."""
    guilty = {
        name(path)
        for path in PRODUCT
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and attribute_chain(node.func)
        in {
            "Image.open",
            "PIL.Image.open",
            "imageio.imread",
            "torchvision.io.read_image",
            "cv2.imread",
        }
    }
    assert guilty == {"ecar/images.py"}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_stay_short(path):
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name(path)} has {lines} lines, at most {MAX_LINES} are allowed"

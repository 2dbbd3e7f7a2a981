"""Rules about the source tree that no single module can show (read, not imported)."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = sorted(
    path for package in ("ecar", "ecar_kernels") for path in ROOT.glob(f"{package}/**/*.py")
)
FOLDERS = ("benchmarks", "csrc", "ecar", "ecar_kernels", "examples", "tests", "tools")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for suffix in ("py", "h", "cpp", "cu", "cuh")
    for path in ROOT.glob(f"{folder}/**/*.{suffix}")
)
MAX_LINES = 400
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
# Kernels and what leads to them: an oracle that calls one would judge it by itself.
NOT_FOR_A_REFERENCE = {"api", "autograd", "cpp", "cuda", "modules", "registry", "sdpa", "triton"}
NOT_FOR_A_REFERENCE |= {
    "by_stage",
    "flash_attn",
    "measured",
    "sdpa_cudnn",
    "sdpa_flash",
    "xformers",
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything the file imports, at any depth of its code and for type
    checkers too: absolute dotted names, and "" for a module as a whole."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def imported_modules(path: Path) -> set[str]:
    """Those modules, and the names as if they were modules."""
    return {full for module, of in imports(path) for full in (module, f"{module}.{of}".strip("."))}


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


# A folder of ecar_kernels with a reference is a family of ops; what is in it is for the package.
FAMILIES = {path.parent.name for path in ROOT.glob("ecar_kernels/*/reference.py")}


def is_internal(module: str) -> bool:
    """Is it a module inside a family of ops, such as a backend, or a private one?"""
    parts = module.partition(":")[0].split(".")
    private = any(part.startswith("_") and not part.endswith("__") for part in parts)
    return parts[0] == "ecar_kernels" and (private or (len(parts) > 2 and parts[1] in FAMILIES))


def mentioned_modules(path: Path) -> set[str]:
    """What the file imports, names by dots, or could import by a string."""
    found = imported_modules(path)
    for node in ast.walk(tree(path)):
        found.add(attribute_chain(node))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value if re.fullmatch(r"[\w.:]+", node.value) else "")
    return found


@pytest.mark.parametrize("path", sorted(ROOT.glob("ecar/**/*.py")), ids=name)
def test_the_model_uses_only_public_modules_of_the_kernels(path):
    """No backend's module, none inside a family, none with an underscore: no exception."""
    guilty = {module for module in mentioned_modules(path) if is_internal(module)}
    assert not guilty, f"{name(path)} uses {guilty}"


def test_what_is_internal_is_seen():
    assert {"adaln", "flow_block", "flow_step", "stage_attention"} <= FAMILIES
    for module in (
        "ecar_kernels.flow_block.native", "ecar_kernels.adaln.reference:adaln",
        "ecar_kernels._native", "ecar_kernels.modules._Attention",
    ):  # fmt: skip
        assert is_internal(module), module
    for module in (
        "ecar_kernels", "ecar_kernels.adaln", "ecar_kernels.registry.AUTO_ORDER", "ecar._native",
        "ecar_kernels.__version__",
    ):  # fmt: skip
        assert not is_internal(module), module


def import_graph(package: str) -> dict[str, set[str]]:
    """Which of a package's modules each of them imports. `from a import b` imports the module a.b
    where there is one, and else a."""
    modules = {}
    for path in ROOT.glob(f"{package}/**/*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {
        module: {
            full if (full := f"{base}.{of}") in modules else base for base, of in imports(path)
        }
        & modules.keys()
        for module, path in modules.items()
    }


def import_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that reach each other (Tarjan's strongly connected components)."""
    order, low, stack, circles = {}, {}, [], []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == order[module]:
            at = stack.index(module)
            circle = sorted(stack[at:])
            del stack[at:]
            if len(circle) > 1 or module in graph[module]:
                circles.append(circle)

    for module in graph:
        if module not in order:
            visit(module)
    return circles


@pytest.mark.parametrize("package", ["ecar", "ecar_kernels"])
def test_no_import_circle(package):
    graph = import_graph(package)
    assert sum(map(len, graph.values())) > len(graph) > 20
    assert not import_circles(graph)


def test_a_circle_is_seen():
    chain = {"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"c"}}
    assert not import_circles(chain)
    assert import_circles(chain | {"c": {"b"}}) == [["b", "c", "d"]]
    assert import_circles(chain | {"c": {"c"}}) == [["c"]]
    assert import_circles(chain | {"c": {"e"}, "e": {"c"}}) == [["c", "e"]]


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
    "codec.save", "model.save", "self.averaged.save_pretrained", "self.model.save_pretrained",
    "self.save_pretrained",
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

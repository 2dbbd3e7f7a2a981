"""The kernel for the Hub: sources under another name. `make hub-kernel` builds and loads it."""

import ast
import json
import re
import subprocess
import sys

import pytest

from tools import hub_kernel

NAME = "_ecar_kernels_test_0123456789"
# As the loader does: a module of that name from the variant's folder.
LOAD = f"""if True:
    import importlib.util, sys
    import ecar_kernels.registry, torch
    spec = importlib.util.spec_from_file_location("{NAME}", sys.argv[1] + "/__init__.py")
    kernel = sys.modules["{NAME}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    x = torch.randn(1, 2, 8)
    assert kernel.adaln(x, x, x).equal(ecar_kernels.registry.resolve(
        "adaln", device="cpu", dtype=torch.float32, backend="reference")(x, x, x))
    rows = {{row.backend: row for row in kernel.backends() if row.op == "adaln"}}
    print(rows["cpp"].why_not)
    print(kernel.FlowBlock.__module__)
    print(sorted(m for m in sys.modules if m.startswith("{NAME}.") and "ecar_kernels/" in
          sys.modules[m].__file__))
"""


@pytest.mark.parametrize(
    "path", hub_kernel.sources(), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_no_source_names_the_installed_library(path):
    depth = len(path.relative_to(hub_kernel.PACKAGE).parts) - 1
    text = hub_kernel.renamed(path.read_text("utf-8"), depth, NAME)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("ecar") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("ecar")
            assert node.level <= depth + 1
    assert not re.search(r"torch\.ops\.ecar|[\"']ecar(_\w+)?(::|\"\)\.|\", \"FRAGMENT)", text)


def test_a_variant_is_loaded_next_to_the_installed_library(tmp_path):
    folder = tmp_path / "torch-cpu"
    hub_kernel.write_variant(folder, NAME, {"type": "cpu"}, None)
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    why_not, module, foreign = done.stdout.splitlines()
    assert why_not == "the C++ library is not built: the variant torch-cpu is without it"
    assert module.startswith(f"{NAME}.") and foreign == "[]"
    metadata = json.loads((folder / "metadata.json").read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    written = {name for name in files if "__pycache__" not in name} - {"metadata.json"}
    assert set(metadata["digest"]["files"]) == written


def test_the_name_is_that_of_the_sources(monkeypatch):
    name = hub_kernel.identity("cpu")
    assert re.fullmatch(r"_ecar_kernels_cpu_[0-9a-f]{10}", name)
    assert hub_kernel.identity("cpu") == name != hub_kernel.identity("cuda")
    some = hub_kernel.sources()[1:]
    monkeypatch.setattr(hub_kernel, "sources", lambda: some)
    assert hub_kernel.identity("cpu") != name


def test_every_instruction_set_is_in_the_build():
    text = hub_kernel.build_toml()
    cmake = (hub_kernel.ROOT / "CMakeLists.txt").read_text("utf-8")
    for name in hub_kernel.SETS:
        assert f"set(FLAGS_{name} " in cmake and f"-DECAR_ISA={name}" in text
    for path in hub_kernel.ROOT.glob("csrc/cpu/*.cpp"):
        times = 3 if path.name.endswith("_isa.cpp") else 1
        assert text.count(f'"csrc/cpu/{path.name}"') == times

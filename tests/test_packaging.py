"""What a user installs: the wheel, the sdist, their metadata, and imports without the extras."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from ecar_kernels import _native
from tests.support.native import needs_native

ROOT = Path(__file__).parent.parent
# What `import ecar` and `import ecar_kernels` must do without.
OPTIONAL = [
    "accelerate",
    "diffusers",
    "flash_attn",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "scipy",
    "sklearn",
    "tensorboard",
    "torch_fidelity",
    "torchmetrics",
    "torchvision",
    "triton",
    "xformers",
]
SOURCE_ENTRIES = [
    "CHANGELOG.md",
    "CITATION.cff",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "benchmarks",
    "csrc",
    "ecar",
    "ecar_kernels",
    "pyproject.toml",
    "setup.py",
    "tests",
]


def run(*command, cwd, **environment) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(hook: str, source: Path, out: Path, **environment) -> Path:
    """Calls a hook of the build backend as `pip install --no-build-isolation` does."""
    code = f"from setuptools.build_meta import {hook}; print({hook}({str(out)!r}))"
    return out / run(sys.executable, "-c", code, cwd=source, **environment).splitlines()[-1]


def unpacked(sdist: Path, place: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    (source,) = place.iterdir()
    return source


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The sdist of a copy of the tree, so that the tree itself stays clean."""
    source = tmp_path_factory.mktemp("tree")
    for entry in SOURCE_ENTRIES:
        if (ROOT / entry).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / entry, source / entry, ignore=ignore)
        else:
            shutil.copy(ROOT / entry, source / entry)
    return build("build_sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The wheel built from the sdist alone: what is missing there is missing here."""
    source = unpacked(sdist, tmp_path_factory.mktemp("unpacked"))
    return build("build_wheel", source, tmp_path_factory.mktemp("wheel"))


def product_files() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for package in ("ecar", "ecar_kernels")
        for path in (ROOT / package).rglob("*.py")
    }


def test_sdist_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[-1] for member in archive if member.isfile()}
    wanted = product_files() | {entry for entry in SOURCE_ENTRIES if (ROOT / entry).is_file()}
    for folder, patterns in {"csrc": ["*"], "tests": ["*.py"], "benchmarks": ["*.py"]}.items():
        for pattern in patterns:
            wanted |= {
                str(path.relative_to(ROOT))
                for path in (ROOT / folder).rglob(pattern)
                if path.is_file() and "__pycache__" not in path.parts
            }
    assert wanted <= names, f"missing from the sdist: {sorted(wanted - names)}"
    assert not [n for n in names if n.startswith("benchmarks/results/") or n.endswith(".pyc")]


def test_wheel_holds_both_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert product_files() <= names, f"missing: {sorted(product_files() - names)}"
    tops = {n.split("/")[0] for n in names}
    assert tops == {"ecar", "ecar_kernels", wheel.name.split("-py3")[0] + ".dist-info"}
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert {"ecar/py.typed", "ecar_kernels/py.typed"} <= names


def test_the_wheel_is_for_every_python_of_this_platform(wheel):
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    assert platform == sysconfig.get_platform().replace("-", "_").replace(".", "_")


def libraries(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {n for n in archive.namelist() if "libecar" in n}


@needs_native
def test_the_wheel_holds_the_library(wheel):
    """The CUDA half too, where torch has CUDA and nvcc is found; else why not."""
    held = libraries(wheel)
    assert f"ecar_kernels/{_native.NAMES[sys.platform == 'darwin']}" in held
    cuda = {f"ecar_kernels/{name}" for name in (_native.CUDA_NAME, _native.WHY_NOT_CUDA)}
    assert len(held) == 2 and len(held & cuda) == 1


@needs_native
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not on this machine")
def test_the_library_asks_torch_for_its_stable_interface_alone():
    """C functions: a mangled name of torch would tie the library to one release of it."""
    (library,) = [path for name in _native.NAMES if (path := _native.FOLDER / name).is_file()]
    names = run("nm", "-D", "--undefined-only", str(library), cwd=library.parent).split()
    assert "aoti_torch_empty_strided" in names
    torch_names = re.compile(r"_ZT?[A-Z]*(2at|3c10|5torch|5caffe2)")
    assert not [name for name in names if torch_names.match(name)]


BROKEN = {
    "/nonexistent/c++": "no C++ compiler was found (tried /nonexistent/c++)",
    "false": "the build failed: The C++ compiler ",
}


@pytest.mark.parametrize("compiler", BROKEN)
def test_without_a_compiler_the_wheel_says_so(compiler, sdist, tmp_path):
    source = unpacked(sdist, tmp_path / "source")
    wheel = build("build_wheel", source, tmp_path, CXX=compiler)
    assert libraries(wheel) == {f"ecar_kernels/{_native.WHY_NOT_BUILT}"}
    with zipfile.ZipFile(wheel) as archive:
        reason = archive.read(f"ecar_kernels/{_native.WHY_NOT_BUILT}").decode()
    assert reason.startswith(BROKEN[compiler])
    assert reason.endswith(" (when ecar was installed)\n") and reason.count("\n") == 1
    with pytest.raises(AssertionError, match=re.escape("the C++ library cannot be built: ")):
        build("build_wheel", source, tmp_path, CXX=compiler, ECAR_REQUIRE_NATIVE="1")


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (file,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(file).decode())
        (file,) = [n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt")]
        assert "ecar = ecar.cli:main" in archive.read(file).decode()
    import ecar_kernels

    assert metadata["Name"] == "ecar"
    assert metadata["Version"] == ecar_kernels.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    requirements = metadata.get_all("Requires-Dist")
    for requirement in requirements:
        pinned = re.search(r"==|<|~=", requirement.split(";")[0])
        assert not pinned, f"{requirement}: only lower bounds, or users cannot combine us"
    base = {re.split(r"[ <>=;\[]", r)[0] for r in requirements if "extra ==" not in r}
    assert base == {"huggingface_hub", "numpy", "pillow", "safetensors", "torch", "tqdm", "triton"}
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras == {
        "all",
        "attention",
        "bench",
        "dev",
        "docs",
        "eval",
        "gallery",
        "inception",
        "onnx",
        "runtimes",
        "test",
        "train",
        "shards",
        "vae",
    }


def test_installed_console_script():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="ecar")
    assert [script.value for script in scripts] == ["ecar.cli:main"]
    assert callable(next(iter(scripts)).load())


def test_wheel_works_without_the_optional_packages(wheel, tmp_path):
    """Both packages import, and an op runs, from the wheel alone, outside the source tree."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # any import of it raises ImportError
sys.path.insert(0, {str(tmp_path)!r})
import ecar, ecar_kernels, torch
for package in (ecar, ecar_kernels):
    assert package.__file__.startswith({str(tmp_path)!r}), package.__file__
x = torch.randn(2, 3, 8, dtype=torch.float32)
y = ecar_kernels.adaln(x, torch.zeros_like(x), torch.zeros_like(x))
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,), eps=1e-6))
for name in ecar.__all__:
    getattr(ecar, name)
from ecar_kernels.__main__ import main
main()
"""
    out = run(sys.executable, "-c", code, cwd=tmp_path)
    assert "stage_attention" in out and "reference" in out


def test_a_clone_does_not_hide_the_package(tmp_path):
    """As `make` installs it; Python is then run in the folder above a clone named ecar."""
    clone = tmp_path / "ecar"
    for package in ("ecar", "ecar_kernels"):
        shutil.copytree(
            ROOT / package,
            clone / package,
            ignore=shutil.ignore_patterns("__pycache__", "libecar*"),
        )
    for entry in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / entry, clone / entry)
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "zz.pth").write_text(sysconfig.get_path("purelib"))  # torch, pip, setuptools
    without_ours = {"PYTHONPATH": "", "CXX": "/nonexistent/c++"}
    run(
        python,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--editable",
        clone,
        cwd=clone,
        **without_ours,
    )
    code = "from ecar import ECARPipeline; import ecar_kernels as k; print(k.__file__)"
    said = run(python, "-c", code, cwd=tmp_path, **without_ours)
    assert said.strip() == str(clone / "ecar_kernels" / "__init__.py")


BUILDS = {"lint": 0, "docs": 0, "report": 0, "demo": 1, "test": 1, "bench": 1, "matrix": 1}


@pytest.mark.parametrize("target", BUILDS)
def test_make_builds_the_library_once_or_not_at_all(target, tmp_path):
    """A list of the commands for a new environment, as after a change of pyproject.toml."""
    commands = run("make", "-n", target, f"VENV={tmp_path / 'venv'}", cwd=ROOT)
    assert len(re.findall(r"--editable|build_ext|install \.", commands)) == BUILDS[target]

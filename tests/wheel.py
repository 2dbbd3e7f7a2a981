"""What a user installs, end to end: python -m tests.wheel [PYTHON:TORCH ...], `make matrix`.

An sdist of the tree is made. For each pair, in a new virtual environment, pip alone builds it into
a wheel against that torch, and what the wheel installs passes tests/smoke.py; then so does the
wheel of the first pair, for the library's ABI is stable. At the end, the sdist where no compiler
is found. With --extras, the first pair's wheel also passes tests/smoke_extras.py in each
environment, with the extras installed: some minutes and 1 GB more. Environments are removed when
done.

    python -m tests.wheel 3.10:2.10.0 3.13:newest    # by pyenv's versions or the path
    python -m tests.wheel --extras 3.10:2.10.0 3.13:newest
    python -m tests.wheel /usr/bin/python3:2.12.1
    python -m tests.wheel --environment build/old    # with the torch in it; ecar is taken out again
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD_SDIST = "from setuptools.build_meta import build_sdist as b; import sys; b(sys.argv[1])"
SMOKE = ROOT / "tests" / "smoke.py"
SMOKE_EXTRAS = ROOT / "tests" / "smoke_extras.py"
EXTRAS = "train,eval,vae,shards,gallery,onnx"
NO_COMPILER = "/nonexistent/c++"
WITHOUT_COMPILER = f"no C++ compiler was found (tried {NO_COMPILER}) (when ecar was installed)"
LIBRARIES = (["ecar_kernels/libecar_cpu.so"], ["ecar_kernels/libecar_cpu.dylib"])


def run(*command: object, **environment: str) -> None:
    begin = time.monotonic()
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tempfile.gettempdir(),
        env=os.environ | environment,
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\nmatrix: failed: {' '.join(map(str, command))}")
    print(f"{time.monotonic() - begin:5.0f} s  {' '.join(map(str, command))}", flush=True)


def find_python(name: str) -> str:
    """An interpreter by its path, or the newest of a version: pyenv's, else one on the path."""
    if os.sep in name:
        return name
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = sorted(
        (tuple(map(int, folder.name.split("."))), folder / "bin" / "python")
        for folder in versions.glob("*")
        if f"{folder.name}.".startswith(f"{name}.") and folder.name.replace(".", "").isdecimal()
    )
    on_path = shutil.which(f"python{name}")
    if not found and on_path is None:
        raise SystemExit(f"matrix: no Python {name} in {versions} or on the path")
    return str(found[-1][1]) if found else on_path


def build_sdist(work: Path) -> Path:
    """Of a copy of the tree, so that the tree stays clean."""
    tree = work / "tree"
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    subprocess.run(
        [sys.executable, "-c", BUILD_SDIST, str(work)],
        cwd=tree,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return next(work.glob("ecar-*.tar.gz"))


def build_wheel(sdist: Path, pip: list, folder: Path) -> Path:
    """As `pip install` does, the build isolated; a wheel for every Python 3 of this platform."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    run(
        *pip,
        "wheel",
        sdist,
        "--no-deps",
        "--wheel-dir",
        folder,
        ECAR_REQUIRE_NATIVE="1" if nvcc else "cpu",
        TORCH_CUDA_ARCH_LIST="9.0",
    )
    (wheel,) = folder.glob("ecar-*.whl")
    assert wheel.name.split("-")[2:4] == ["py3", "none"] and "any" not in wheel.name, wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if "libecar_cpu" in name] in LIBRARIES
    print(f"{wheel.stat().st_size / 2**20:5.1f} MiB  {wheel.name}")
    return wheel


def try_in(environment: Path, sdist: Path, first: Path | None, last: bool, extras: bool) -> Path:
    """The wheel built there, for the next ones, or `first`."""
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    wheel = build_wheel(sdist, pip, Path(tempfile.mkdtemp(dir=sdist.parent)))
    run(*pip, "install", wheel)
    run(python, "-I", SMOKE)
    if first is not None:
        run(*pip, "install", "--no-deps", "--force-reinstall", first)
        run(python, "-I", SMOKE)
    if last:
        run(*pip, "install", "--no-deps", "--force-reinstall", sdist, CXX=NO_COMPILER)
        run(python, "-I", SMOKE, WITHOUT_COMPILER)
    if extras:
        run(*pip, "install", "--no-deps", "--force-reinstall", first or wheel)
        run(*pip, "install", f"{first or wheel}[{EXTRAS}]", "peft")
        run(python, "-I", SMOKE_EXTRAS)
    run(*pip, "uninstall", "--yes", "ecar")
    return first or wheel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "pairs",
        nargs="*",
        metavar="PYTHON:TORCH",
        help="a version or path, and a version or `newest` (default: those in use)",
    )
    parser.add_argument(
        "--environment",
        action="append",
        type=Path,
        default=[],
        metavar="PATH",
        help="an environment that has torch, to be used as it is",
    )
    parser.add_argument(
        "--extras", action="store_true", help="also try what needs the extras, installed"
    )
    arguments = parser.parse_args()
    if not arguments.pairs and not arguments.environment:
        import torch

        arguments.pairs = [f"{sys.executable}:{torch.__version__.split('+')[0]}"]
    tried = [
        *((pair, None) for pair in arguments.pairs),
        *((str(path), path.absolute()) for path in arguments.environment),
    ]
    first = None
    with tempfile.TemporaryDirectory(prefix="ecar-matrix-") as folder:
        sdist = build_sdist(Path(folder))
        for i, (name, environment) in enumerate(tried):
            begin, new = time.monotonic(), Path(folder) / f"venv{i}"
            if environment is None:
                python, _, torch_wanted = name.rpartition(":")
                run(find_python(python), "-m", "venv", new)
                run(
                    new / "bin" / "python",
                    "-m",
                    "pip",
                    "--disable-pip-version-check",
                    "install",
                    "--quiet",
                    "torch" if torch_wanted == "newest" else f"torch=={torch_wanted}",
                )
            last = i == len(tried) - 1
            first = try_in(environment or new, sdist, first, last, arguments.extras)
            shutil.rmtree(new, ignore_errors=True)
            print(f"matrix: {name}: {time.monotonic() - begin:.0f} s", flush=True)
    print("matrix: passed")


if __name__ == "__main__":
    main()

"""What a user installs, end to end: python -m tests.wheel, `make wheel-test`.

An sdist of the tree is built into a wheel by pip alone; the wheel goes into an empty virtual
environment for each --torch and passes tests/smoke.py there; and so does the sdist where no
compiler is found. One wheel serves every torch: the library's ABI is stable.
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
NO_COMPILER = "/nonexistent/c++"
WITHOUT_COMPILER = (f"no C++ compiler was found (tried {NO_COMPILER}) (when ecar was installed)")


def run(*command: object, **environment: str) -> None:
    begin = time.monotonic()
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, cwd=tempfile.gettempdir(),
                          env=os.environ | environment)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\nwheel-test: failed: {' '.join(map(str, command))}")
    print(f"{time.monotonic() - begin:5.0f} s  {' '.join(map(str, command))}", flush=True)


def build_sdist(work: Path) -> Path:
    """Of a copy of the tree, so that the tree stays clean."""
    tree = work / "tree"
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                           cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    subprocess.run([sys.executable, "-c", BUILD_SDIST, str(work)], cwd=tree, check=True,
                   stdout=subprocess.DEVNULL)
    return next(work.glob("ecar-*.tar.gz"))


def build_wheel(sdist: Path, pip: list) -> Path:
    """As `pip wheel .` does, the build isolated; a wheel for every Python 3 of this platform."""
    run(*pip, "wheel", sdist, "--no-deps", "--wheel-dir", sdist.parent, ECAR_REQUIRE_NATIVE="1")
    (wheel,) = sdist.parent.glob("ecar-*.whl")
    assert wheel.name.split("-")[2:4] == ["py3", "none"] and "any" not in wheel.name, wheel.name
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if "libecar_cpu" in name]
    assert libraries in (["ecar_kernels/libecar_cpu.so"], ["ecar_kernels/libecar_cpu.dylib"])
    print(f"{wheel.stat().st_size / 2**20:5.1f} MiB  {wheel.name}")
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", action="append", metavar="REQUIREMENT",
                        help="the torch of an environment; again for more (default: this one's)")
    arguments = parser.parse_args()
    if arguments.torch is None:
        import torch

        arguments.torch = [f"torch=={torch.__version__.split('+')[0]}"]
    wheel = None
    with tempfile.TemporaryDirectory(prefix="ecar-wheel-") as folder:
        work = Path(folder)
        sdist = build_sdist(work)
        for i, torch_wanted in enumerate(arguments.torch):
            environment = work / f"venv{i}"
            run(sys.executable, "-m", "venv", environment)
            python = environment / "bin" / "python"
            pip = [python, "-m", "pip", "--disable-pip-version-check"]
            run(*pip, "install", "--quiet", torch_wanted)
            if wheel is None:
                wheel = build_wheel(sdist, pip)
            run(*pip, "install", wheel)
            run(python, "-I", ROOT / "tests" / "smoke.py")
        # The last environment again, as if no compiler were there.
        run(*pip, "install", "--no-deps", "--force-reinstall", sdist, CXX=NO_COMPILER)
        run(python, "-I", ROOT / "tests" / "smoke.py", WITHOUT_COMPILER)
    print("wheel-test: passed")


if __name__ == "__main__":
    main()

"""Builds the distribution `ecar` (metadata: pyproject.toml) and its C++ library.

The version is read, not imported: a build must not need torch. The library is optional: where
something that its build needs is missing, the install succeeds, says what, and leaves the reason
in the package for `python -m ecar_kernels`. ECAR_REQUIRE_NATIVE=1 makes it an error.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION_FILE = ROOT / "ecar_kernels" / "version.py"
LIBRARIES = ("libecar_cpu.so", "libecar_cpu.dylib", "libecar_cuda.so")
CUDA_PLACES = (os.path.join(os.environ.get("CUDA_HOME", ""), "bin"), "/usr/local/cuda/bin")
WHY_NOT_BUILT = "libecar_cpu.why_not.txt"  # ecar_kernels/_native.py reads both
WHY_NOT_CUDA = "libecar_cuda.why_not.txt"
OLDEST_TORCH = (2, 10)


class CannotBuildError(Exception):
    """The reason, for the user."""


def read_version() -> str:
    match = re.search(r'^__version__ = "([^"]+)"$', VERSION_FILE.read_text("utf-8"), re.MULTILINE)
    if match is None:
        raise ValueError(f'{VERSION_FILE}: expected a line __version__ = "..."')
    return match[1]


def find_tool(name: str) -> str:
    """A program on the path or beside this Python."""
    scripts = sysconfig.get_path("scripts")
    found = shutil.which(name) or shutil.which(name, path=scripts)
    if found is None:
        raise CannotBuildError(f"{name} was not found")
    return found


def find_compiler() -> None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name.split()[0]) for name in names):
        raise CannotBuildError(f"no C++ compiler was found (tried {', '.join(names)})")


def first_error(lines: list[str]) -> str:
    """The first error in the build's output, on one line."""
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):  # a sentence over the next, indented lines
            said = " ".join(" ".join(lines[i + 1 : i + 9]).split())
            return said.partition(". ")[0] or line
        if re.search(r"\berror\b", line, re.IGNORECASE):
            return line.strip()
    return lines[-1].strip() if lines else "it printed nothing"


def find_torch() -> Path:
    """torch's folder: $ECAR_TORCH_DIR, the importable one, or the one of the environment.

    The last serves pip's isolated builds, which hide the environment's packages; its headers
    will do, for the ABI is stable.
    """
    if os.environ.get("ECAR_TORCH_DIR"):
        return Path(os.environ["ECAR_TORCH_DIR"])
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    places += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    for place in places:
        if (place / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            version = re.search(
                r"^__version__ = '(\d+)\.(\d+)",
                (place / "version.py").read_text("utf-8"),
                re.MULTILINE,
            )
            if version is not None and tuple(map(int, version.groups())) >= OLDEST_TORCH:
                return place
    oldest = ".".join(map(str, OLDEST_TORCH))
    raise CannotBuildError(f"torch {oldest} or newer was not found in this environment")


class BuildNative(build_ext):
    """Runs CMake and puts the library into ecar_kernels/."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = (ROOT if in_place else Path(self.build_lib)) / "ecar_kernels"
        package.mkdir(parents=True, exist_ok=True)
        for name in (*LIBRARIES, WHY_NOT_BUILT, WHY_NOT_CUDA):
            (package / name).unlink(missing_ok=True)
        try:
            self.build_into(package)
        except CannotBuildError as error:
            if os.environ.get("ECAR_REQUIRE_NATIVE") == "1":
                raise SystemExit(f"ecar: the C++ library cannot be built: {error}") from error
            print(
                f"ecar: the C++ library is left out, the references serve every op: {error}",
                file=sys.stderr,
            )
            (package / WHY_NOT_BUILT).write_text(f"{error} (when ecar was installed)\n", "utf-8")

    def build_into(self, package: Path) -> None:
        cmake, ninja, torch = find_tool("cmake"), find_tool("ninja"), find_torch()
        find_compiler()
        folder = Path(self.build_temp).resolve() / "native"
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        with log.open("w", encoding="utf-8") as output:
            for command in (
                [
                    cmake,
                    "-S",
                    ROOT,
                    "-B",
                    folder,
                    "-G",
                    "Ninja",
                    f"-DCMAKE_MAKE_PROGRAM={ninja}",
                    f"-DECAR_TORCH_DIR={torch}",
                    "-DBUILD_TESTING=OFF",
                    *os.environ.get("CMAKE_ARGS", "").split(),
                ],
                [cmake, "--build", folder],
            ):
                done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT)
                if done.returncode != 0:
                    lines = log.read_text("utf-8", errors="replace").splitlines()
                    print("\n".join(lines[-60:]), file=sys.stderr)
                    shutil.rmtree(folder)  # its cache would fail the next try, too
                    raise CannotBuildError(f"the build failed: {first_error(lines)}")
            self.build_cuda(cmake, folder, package, output)
        for name in LIBRARIES:
            if (folder / name).is_file():
                shutil.copy2(folder / name, package / name)

    def build_cuda(self, cmake: str, folder: Path, package: Path, output: object) -> None:
        """The CUDA half, where nvcc is; what hinders it is left in the package."""
        (folder / "libecar_cuda.so").unlink(missing_ok=True)
        places = os.pathsep.join((os.environ.get("PATH", ""), *CUDA_PLACES))
        if shutil.which("nvcc", path=places) is None:
            reason = "nvcc was not found"
        elif subprocess.run([cmake, "--build", folder, "--target", "ecar_cuda"], stdout=output,
                            stderr=subprocess.STDOUT).returncode != 0:
            reason = f"the CUDA sources did not build (log: {folder / 'log.txt'})"
        else:
            return
        print(f"ecar: the CUDA C++ library is left out: {reason}", file=sys.stderr)
        (package / WHY_NOT_CUDA).write_text(f"{reason} (when ecar was installed)\n", "utf-8")

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "ecar_kernels"
        return [
            str(package / name)
            for name in (*LIBRARIES, WHY_NOT_BUILT, WHY_NOT_CUDA)
            if (package / name).is_file()
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the library knows no Python, and torch's ABI is stable."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    version=read_version(),
    distclass=NativeDistribution,
    ext_modules=[Extension("ecar_kernels.libecar_cpu", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)

"""Builds the distribution `ecar` (metadata: pyproject.toml) and its C++ library.

The version is read, not imported: a build must not need torch. The library is optional: where
something that its build needs is missing, the install succeeds, says what, and leaves the reason
in the package for `python -m ecar_kernels`; ECAR_REQUIRE_NATIVE makes it an error. A library in
the source tree is replaced at the end of a build that succeeded, by renaming: a failed one leaves
the library of the build before, and running processes keep theirs.

Environment variables: ECAR_REQUIRE_NATIVE (1, cpu or cuda), TORCH_CUDA_ARCH_LIST, ECAR_TORCH_DIR,
CUDA_HOME, CMAKE_ARGS, and the compiler's CXX, CXXFLAGS and LDFLAGS.
"""

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION_FILE = ROOT / "ecar_kernels" / "version.py"
CPU_NAMES = ("libecar_cpu.so", "libecar_cpu.dylib")
CUDA_NAME = "libecar_cuda.so"
WHY_NOT_BUILT = "libecar_cpu.why_not.txt"  # ecar_kernels/_native.py reads both
WHY_NOT_CUDA = "libecar_cuda.why_not.txt"
PUT = (*CPU_NAMES, CUDA_NAME, WHY_NOT_BUILT, WHY_NOT_CUDA)  # into the package
OLDEST_TORCH = (2, 10)
OLDEST_TOOLS = {"cmake": (3, 18), "ninja": (1, 8)}
CHIPS = ("80", "90", "100", "120")  # where TORCH_CUDA_ARCH_LIST names none
DECIDES_THE_BUILD = (
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
    "CPATH",
    "CPLUS_INCLUDE_PATH",
    "MACOSX_DEPLOYMENT_TARGET",
    "SDKROOT",
)


class CannotBuildError(Exception):
    """The reason, for the user."""


def read_version() -> str:
    match = re.search(r'^__version__ = "([^"]+)"$', VERSION_FILE.read_text("utf-8"), re.MULTILINE)
    if match is None:
        raise ValueError(f'{VERSION_FILE}: expected a line __version__ = "..."')
    return match[1]


def required() -> str:
    """What the build must not go on without, of ECAR_REQUIRE_NATIVE: "", "1", "cpu" or "cuda"."""
    said = os.environ.get("ECAR_REQUIRE_NATIVE", "")
    if said not in ("", "0", "1", "cpu", "cuda"):
        raise SystemExit(
            "ecar: environment variable ECAR_REQUIRE_NATIVE: expected 1, cpu, cuda or "
            f"0, got {said!r}"
        )
    return said.replace("0", "")


def output(*command: object) -> str | None:
    """What a program prints, or None where it does not run."""
    try:
        return subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            check=True,
            stdin=subprocess.DEVNULL,
        ).stdout
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def find_tool(name: str) -> str:
    """The first that runs and is new enough, beside this Python or on the path."""
    oldest, refused = OLDEST_TOOLS[name], []
    places = [sysconfig.get_path("scripts"), *os.environ.get("PATH", "").split(os.pathsep)]
    for place in dict.fromkeys(filter(None, places)):
        if (path := shutil.which(name, path=place)) is None:
            continue
        version = re.search(r"(\d+)\.(\d+)[\d.]*", output(path, "--version") or "")
        if version is not None and tuple(map(int, version.groups())) >= oldest:
            return path
        refused.append(f"{path} {f'is {version[0]}' if version else 'does not run'}")
    if refused:
        wanted = ".".join(map(str, oldest))
        raise CannotBuildError(f"{name} {wanted} or newer was not found ({', '.join(refused)})")
    raise CannotBuildError(f"{name} was not found")


def split(variable: str) -> list[str]:
    """An environment variable's words, by the shell's rules."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise CannotBuildError(f"environment variable {variable}: {error}") from error


def find_compiler() -> str:
    """The compiler's path. $CXX is a path or a command with arguments, as CMake takes it."""
    said = os.environ.get("CXX", "").strip()
    names = [said] if said else ["c++", "g++", "clang++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None and said:
        found = shutil.which(split("CXX")[0])
    if found is None:
        raise CannotBuildError(f"no C++ compiler was found (tried {', '.join(names)})")
    return found


def first_error(lines: list[str]) -> str:
    """The first error in the build's output, on one line."""
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):  # a sentence over the next, indented lines
            said = " ".join(" ".join(lines[i + 1 : i + 9]).split())
            return said.partition(". ")[0] or line
        if re.search(r"\berror\b|cannot find -l", line, re.IGNORECASE):
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
            version = re.match(r"(\d+)\.(\d+)", torch_says(place, "__version__") or "")
            if version is not None and tuple(map(int, version.groups())) >= OLDEST_TORCH:
                return place
    oldest = ".".join(map(str, OLDEST_TORCH))
    raise CannotBuildError(f"torch {oldest} or newer was not found in this environment")


def torch_says(torch: Path, name: str) -> str | None:
    """A string of torch/version.py; None where it is none."""
    file = torch / "version.py"
    text = file.read_text("utf-8") if file.is_file() else ""
    found = re.search(rf"^{name}\b[^=\n]*= '([^']*)'", text, re.MULTILINE)
    return found and found[1]


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    places = [os.path.join(home, "bin")] if home else []
    places += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    if (found := shutil.which("nvcc", path=os.pathsep.join(places))) is None:
        raise CannotBuildError("nvcc was not found")
    return found


def gencode(nvcc: str) -> list[str]:
    """Values of -gencode for TORCH_CUDA_ARCH_LIST, as in "9.0" or "8.0;9.0+PTX".

    By default every chip of CHIPS that this nvcc knows, and PTX of the newest for later ones.
    """
    known = re.findall(r"sm_(\d+)", output(nvcc, "--list-gpu-code") or "")
    if not known:
        raise CannotBuildError(f"{nvcc} does not run")
    named = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(";, "))
    if named == [""]:
        chips = [chip for chip in CHIPS if chip in known]
        if not chips:
            raise CannotBuildError(f"{nvcc} knows none of sm_{', sm_'.join(CHIPS)}")
        return [
            *(f"arch=compute_{chip},code=sm_{chip}" for chip in chips),
            f"arch=compute_{chips[-1]},code=compute_{chips[-1]}",
        ]
    values = []
    for word in named:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if found is None or found[1] + found[2] not in known:
            raise SystemExit(
                "ecar: environment variable TORCH_CUDA_ARCH_LIST: expected compute capabilities "
                f"that {nvcc} knows, as in '8.0;9.0+PTX', got {word!r}"
            )
        chip = found[1] + found[2] + found[3]
        values.append(f"arch=compute_{chip},code=sm_{chip}")
        if found[4]:
            values.append(f"arch=compute_{chip},code=compute_{chip}")
    return values


class BuildNative(build_ext):
    """Runs CMake and puts the libraries into ecar_kernels/."""

    def run(self) -> None:
        self.required = required()
        in_place = self.inplace or self.editable_mode
        package = (ROOT if in_place else Path(self.build_lib)) / "ecar_kernels"
        package.mkdir(parents=True, exist_ok=True)
        if not in_place:  # what an earlier build left must not go into this wheel
            shutil.rmtree(self.build_temp, ignore_errors=True)
            for name in PUT:
                (package / name).unlink(missing_ok=True)
        try:
            made = self.build(ROOT / "build" if in_place else Path(self.build_temp).resolve())
        except CannotBuildError as error:
            if self.required:
                raise SystemExit(f"ecar: the C++ library cannot be built: {error}") from error
            what = "is left out, the references serve every op"
            if any((package / name).is_file() for name in CPU_NAMES):
                what = "stays that of an earlier build"
            print(f"ecar: the C++ library {what}: {error}", file=sys.stderr)
            put({WHY_NOT_BUILT: f"{error} (when ecar was installed)\n".encode()}, package)
            return
        put(made, package)
        for name in set(PUT) - set(made):  # the two halves are of one build
            (package / name).unlink(missing_ok=True)

    def build(self, folder: Path) -> dict[str, bytes]:
        """The contents of the package's files: the libraries, or why there is no CUDA half."""
        cmake, ninja, torch = find_tool("cmake"), find_tool("ninja"), find_torch()
        # CMake asks its surroundings once; in other surroundings, another folder. (Its own path is
        # another one in each isolated build.)
        decides = [
            find_compiler(),
            str(ROOT),
            str(torch),
            torch_says(torch, "__version__"),
            *(
                f"{name}={value}"
                for name, value in sorted(os.environ.items())
                if name in DECIDES_THE_BUILD or name.startswith("CMAKE_")
            ),
        ]
        digest = hashlib.sha256(repr(decides).encode()).hexdigest()
        folder = folder / f"native-{digest[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        try:
            nvcc = self.find_nvcc(torch)
            codes, why_not_cuda = gencode(nvcc), None
        except CannotBuildError as error:
            nvcc, codes, why_not_cuda = "", [], str(error)
        try:
            run(
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
                    f"-DECAR_NVCC={nvcc}",
                    f"-DECAR_GENCODE={';'.join(codes)}",
                    "-DBUILD_TESTING=OFF",
                    *split("CMAKE_ARGS"),
                ],
                log,
            )
        except CannotBuildError:
            shutil.rmtree(folder)  # its cache would fail the next try, too
            raise
        run([cmake, "--build", folder], log)
        if nvcc and "CUDART-NOTFOUND" in (folder / "CMakeCache.txt").read_text("utf-8"):
            why_not_cuda = "cudart_static was not found"
        if why_not_cuda is None:
            try:
                run([cmake, "--build", folder, "--target", "ecar_cuda"], log)
            except CannotBuildError as error:
                why_not_cuda = str(error)
        name = next(name for name in CPU_NAMES if (folder / name).is_file())
        made = {name: (folder / name).read_bytes()}
        if why_not_cuda is None:
            return made | {CUDA_NAME: (folder / CUDA_NAME).read_bytes()}
        if self.required == "cuda" or (self.required == "1" and torch_says(torch, "cuda")):
            raise CannotBuildError(f"the CUDA half: {why_not_cuda}")
        print(f"ecar: the CUDA C++ library is left out: {why_not_cuda}", file=sys.stderr)
        return made | {WHY_NOT_CUDA: f"{why_not_cuda} (when ecar was installed)\n".encode()}

    def find_nvcc(self, torch: Path) -> str:
        """nvcc, unless this torch could not use what it compiles."""
        if torch_says(torch, "cuda") is None and self.required != "cuda":
            raise CannotBuildError("torch is built without CUDA")
        return find_nvcc()

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "ecar_kernels"
        return [str(package / name) for name in PUT if (package / name).is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


def run(command: list, log: Path) -> None:
    """Its output goes to the log; CannotBuildError has the first error of it."""
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            list(map(str, command)),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"LC_ALL": "C.UTF-8"},
        )
    if done.returncode != 0:
        lines = log.read_text("utf-8", errors="replace").splitlines()
        print("\n".join(lines[-60:]), file=sys.stderr)
        raise CannotBuildError(f"the build failed: {first_error(lines)}")


def put(files: dict[str, bytes], folder: Path) -> None:
    """All are written under other names before the first takes its place."""
    partial = {name: folder / f"{name}.partial" for name in files}
    try:
        for name, content in files.items():
            partial[name].write_bytes(content)
        for name in files:
            os.replace(partial[name], folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


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

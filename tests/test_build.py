"""Builds by setup.py and CMakeLists.txt in surroundings that a user may have.

They are of a small tree: the real setup.py and CMakeLists.txt, a torch of two files, and one
function for each instruction set, which does what wrong flags break.
"""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ecar_kernels import _native
from tests.support.native import needs_native

ROOT = Path(__file__).parent.parent
PROBE = ROOT / "tests" / "csrc" / "isa_probe.cpp"
SOURCES = {
    "ecar/__init__.py": "",
    "ecar_kernels/__init__.py": "",
    "csrc/include/ecar/nothing.h": "",
    "csrc/cpu/plain.cpp": "int ecar_plain() { return 0; }\n",
    "csrc/cpu/probe_isa.cpp": PROBE.read_text("utf-8"),
    "csrc/bindings/probe.cpp": PROBE.read_text("utf-8"),
    "csrc/cuda/flow_step.cu": 'extern "C" int ecar_cuda() { return 0; }\n',
    "csrc/bindings/cuda/flow_step.cpp": "",
    "torch/include/torch/csrc/stable/library.h": "",
    "torch/version.py": "__version__ = '2.10.0'\ncuda: Optional[str] = None\n",
}
# A library's answers, on every instruction set of this CPU, next to numpy's; in a process of its
# own, which a library that flushes subnormals would change.
ASK = """
import ctypes, sys, numpy as np
given = np.array([np.nan, np.inf, 1e-45, 1e8, 1, -0.0, 3, 1.1, 1.3, -1.43, *range(10, 32)], "f")
right = np.concatenate([[1, 1, given[2], 0, 0, given[7] * given[8] + given[9]],
                        given[6:] / given[6]])
library, asked = ctypes.CDLL(sys.argv[1]), 0
for isa in range(3):
    out = np.full_like(given, -1)
    if library.probe(isa, given.ctypes.data_as(ctypes.c_void_p),
                     out.ctypes.data_as(ctypes.c_void_p)):
        asked += 1
        wrong = [i for i in range(32) if out[i].tobytes() != right[i].astype("f").tobytes()]
        if wrong: print("wrong:", isa, [(i, out[i], right[i]) for i in wrong])
if float("5e-324") * float("1") == 0: print("wrong: subnormals of this process are flushed")
print("instruction sets:", asked)
"""


def compiler() -> str:
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """In a folder whose name a shell or CMake would take apart."""
    tree = tmp_path_factory.mktemp("small") / "a tree's folder (1)"
    for name, text in SOURCES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    for name in (
        "setup.py",
        "CMakeLists.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "ecar_kernels/version.py",
    ):
        shutil.copy(ROOT / name, tree / name)
    (tree / "torch" / "lib").mkdir()
    subprocess.run(
        [
            compiler(),
            "-shared",
            "-fPIC",
            tree / "csrc" / "cpu" / "plain.cpp",
            "-o",
            tree / "torch" / "lib" / "libtorch_cpu.so",
        ],
        check=True,
    )
    return tree


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    """`setup.py build_ext --inplace`, none of the surroundings' own variables given."""
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CXX", "CMAKE_ARGS", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST")
        and not name.endswith("FLAGS")
    }
    environment = {"ECAR_TORCH_DIR": str(tree / "torch"), "ECAR_REQUIRE_NATIVE": "1"} | environment
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env=own | environment,
        capture_output=True,
        text=True,
    )


def answers(library: Path) -> str:
    done = subprocess.run([sys.executable, "-c", ASK, library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


SURROUNDINGS = {
    "fast math": {"CXXFLAGS": "-ffast-math"},
    "its parts": {
        "CXXFLAGS": "-funsafe-math-optimizations -ffinite-math-only -freciprocal-math "
        "-fno-signed-zeros -fassociative-math -fno-trapping-math"
    },
    "fused products": {
        "CXXFLAGS": "-march=native -ffp-contract=fast",
        "CFLAGS": "-ffast-math",
        "CPPFLAGS": "-ffast-math",
    },
    "fast math at the link": {"LDFLAGS": "-Ofast -ffast-math -funsafe-math-optimizations"},
    "CMake's own": {
        "CMAKE_ARGS": "'-DCMAKE_CXX_FLAGS=-Ofast -Wno-error' -DNOTE='a  note' "
        "-DCMAKE_BUILD_TYPE=Debug"
    },
    "a launcher": {"CXX": "{launcher} {compiler} -ffast-math"},
    "a path with spaces": {"CXX": "{spaced}"},
    "a quoted path and arguments": {"CXX": "'{spaced}' -DQUOTED -Ofast"},
}


@needs_native
class TestSmallTree:
    """Each build takes about three seconds."""

    @pytest.mark.parametrize("name", SURROUNDINGS)
    def test_surroundings(self, name, tree, tmp_path):
        spaced = tmp_path / "my tools" / "c++"
        script(spaced, f'exec {shlex.quote(compiler())} "$@"')
        launcher = script(tmp_path / "launcher", f'echo used >> "{tmp_path}/used"; exec "$@"')
        given = {
            key: value.format(spaced=spaced, launcher=launcher, compiler=compiler())
            for key, value in SURROUNDINGS[name].items()
        }
        done = build(tree, **given)
        assert done.returncode == 0, done.stdout + done.stderr
        said = answers(tree / "ecar_kernels" / "libecar_cpu.so")
        assert "wrong" not in said and int(said.split()[-1]) >= 1
        assert (tmp_path / "used").exists() == ("launcher" in given.get("CXX", ""))
        caches = [file.read_text() for file in (tree / "build").glob("native-*/CMakeCache.txt")]
        noted = any("\nNOTE:UNINITIALIZED=a  note\n" in text for text in caches)
        assert noted or "NOTE" not in given.get("CMAKE_ARGS", "")

    def test_the_probe_sees_wrong_flags(self, tree, tmp_path):
        """The same sources without what CMakeLists.txt adds."""
        parts = [
            f'#define ECAR_ISA {isa}\n#include "{PROBE}"\n#undef ECAR_ISA\n'
            for isa in ("baseline", "avx2", "avx512")
        ]
        source, library = tmp_path / "all.cpp", tmp_path / "wrong.so"
        source.write_text("".join((*parts, f'#include "{PROBE}"\n')))
        subprocess.run(
            [
                compiler(),
                "-std=c++17",
                "-shared",
                "-fPIC",
                "-O3",
                "-ffast-math",
                source,
                "-o",
                library,
            ],
            check=True,
        )
        assert "wrong: 0" in answers(library)

    def test_a_build_is_reused_in_the_same_surroundings_alone(self, tree):
        library = tree / "ecar_kernels" / "libecar_cpu.so"
        build(tree, CXXFLAGS="-DONE")
        first = library.read_bytes()
        times = {file: file.stat().st_mtime_ns for file in (tree / "build").rglob("*.o")}
        build(tree, CXXFLAGS="-DTWO")
        assert set((tree / "build").rglob("*.o")) > set(times)
        build(tree, CXXFLAGS="-DONE")
        assert {file: file.stat().st_mtime_ns for file in times} == times
        assert library.read_bytes() == first

    def test_the_cuda_half(self, tree, tmp_path):
        """By an nvcc that is the C++ compiler; without cudart_static, the CPU half alone."""
        toolkit, log, torch = tmp_path / "tool kit", tmp_path / "asked", tmp_path / "torch"
        source = tree / "csrc" / "cuda" / "flow_step.cu"
        script(
            toolkit / "bin" / "nvcc",
            f"""
case $1 in --list-gpu-code) echo sm_75 sm_80 sm_90; exit;; esac
echo "$@" > {shlex.quote(str(log))}
for last; do :; done
exec {compiler()} -x c++ -fPIC -c {shlex.quote(str(source))} -o "$last" """,
        )
        shutil.copytree(tree / "torch", torch)
        version = SOURCES["torch/version.py"].replace("None", "'13.0'")
        (torch / "version.py").write_text(version)
        # Libraries are looked for in these folders alone: a toolkit of this machine has the file.
        places = f"'-DCMAKE_FIND_ROOT_PATH={torch};{toolkit}'"
        given = {
            "ECAR_TORCH_DIR": str(torch),
            "CUDA_HOME": str(toolkit),
            "ECAR_REQUIRE_NATIVE": "cpu",
            "CMAKE_ARGS": f"{places} -DCMAKE_FIND_ROOT_PATH_MODE_LIBRARY=ONLY",
        }
        package = tree / "ecar_kernels"
        done = build(tree, **given)
        assert done.returncode == 0, done.stdout + done.stderr
        reason = "cudart_static was not found"
        assert f"the CUDA C++ library is left out: {reason}" in done.stderr
        assert (package / _native.WHY_NOT_CUDA).read_text().startswith(reason)
        assert (package / "libecar_cpu.so").is_file() and not log.exists()
        assert not (package / _native.CUDA_NAME).exists()

        (toolkit / "lib64").mkdir()
        subprocess.run(["ar", "qc", toolkit / "lib64" / "libcudart_static.a"], check=True)
        done = build(tree, **given | {"ECAR_REQUIRE_NATIVE": "1", "TORCH_CUDA_ARCH_LIST": "9.0"})
        assert done.returncode == 0, done.stdout + done.stderr
        assert (package / _native.CUDA_NAME).is_file()
        assert not (package / _native.WHY_NOT_CUDA).exists()
        said = log.read_text()
        assert re.findall(r"-gencode (\S+)", said) == ["arch=compute_90,code=sm_90"]
        assert "--fmad=false --ftz=false --prec-div=true --prec-sqrt=true" in said

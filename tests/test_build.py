"""setup.py and CMakeLists.txt in surroundings that a user may have.

Real builds are of a small tree: the real setup.py and CMakeLists.txt, a torch of two files, and one
function for each instruction set, which does what wrong flags break.
"""

import contextlib
import os
import re
import runpy
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

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


@pytest.fixture
def module(monkeypatch, tmp_path) -> dict:
    """setup.py's names; its functions see the tests' replacements in this dict."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("CXX", "CMAKE_ARGS", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "ECAR_REQUIRE_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    found = runpy.run_path(str(ROOT / "setup.py"))
    return found["BuildNative"].run.__globals__


def says(version: str) -> str:
    return f"echo 'a tool, version {version}'"


TOOLS = {  # programs beside Python and in two folders of PATH, and the one taken or the reason
    "none": ([None, None, None], "cmake was not found"),
    "beside Python": ([says("3.18.0"), says("4.4"), None], 0),
    "an old one beside Python": ([says("3.17.5"), says("3.18.4"), None], 1),
    "an old one on PATH": ([None, says("3.10.2"), says("3.25.1")], 2),
    "a broken one": (["exit 3", "echo no version", says("3.30.0")], 2),
    "of another machine": (["\x7fELF", None, says("3.30.0")], 2),
    "one that asks": (["read answer; exit 1", says("3.30.0"), None], 1),
    "old and broken": (
        ["exit 1", says("2.8.12"), None],
        "cmake 3.18 or newer was not found ({0} does not run, {1} is 2.8.12)",
    ),
}


@pytest.mark.parametrize("name", TOOLS)
def test_the_first_cmake_that_will_do(name, module, tmp_path, monkeypatch):
    programs, expected = TOOLS[name]
    folders = [tmp_path / "beside", tmp_path / "first", tmp_path / "second"]
    for folder, text in zip(folders, programs, strict=True):
        if text is not None:
            script(folder / "cmake", text)
    monkeypatch.setattr(module["sysconfig"], "get_path", lambda _: str(folders[0]))
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, folders[1:])))
    if isinstance(expected, int):
        assert module["find_tool"]("cmake") == str(folders[expected] / "cmake")
    else:
        said = expected.format(*(folder / "cmake" for folder in folders))
        with pytest.raises(module["CannotBuildError"], match=f"^{re.escape(said)}$"):
            module["find_tool"]("cmake")


@pytest.mark.parametrize("variable, call", [("CXX", "find_compiler"), ("CMAKE_ARGS", "split")])
def test_an_open_quote_is_named(variable, call, module, monkeypatch):
    monkeypatch.setenv(variable, "'/no such/g++ -O2")
    arguments = [variable] if call == "split" else []
    with pytest.raises(module["CannotBuildError"], match=f"^environment variable {variable}: "):
        module[call](*arguments)


CODES = {  # TORCH_CUDA_ARCH_LIST: the values of -gencode, or the word refused
    None: ["80,sm_80", "90,sm_90", "120,sm_120", "120,compute_120"],
    "": ["80,sm_80", "90,sm_90", "120,sm_120", "120,compute_120"],
    "9.0": ["90,sm_90"],
    "8.0;9.0+PTX": ["80,sm_80", "90,sm_90", "90,compute_90"],
    "7.5 12.0a": ["75,sm_75", "120a,sm_120a"],
    "8.0, 9.0": ["80,sm_80", "90,sm_90"],
    "7.0": "7.0",
    "8.0;Hopper": "Hopper",
    "sm_90": "sm_90",
    "9": "9",
    "9.0+ptx": "9.0+ptx",
}


@pytest.mark.parametrize("chips", CODES)
def test_chips(chips, module, tmp_path, monkeypatch):
    nvcc = script(tmp_path / "nvcc", "echo sm_75 sm_80 sm_90 sm_120 sm_121")
    if chips is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", chips)
    if isinstance(CODES[chips], list):
        assert module["gencode"](nvcc) == [
            f"arch=compute_{code.replace(',', ',code=')}" for code in CODES[chips]
        ]
    else:
        with pytest.raises(
            SystemExit,
            match=f"TORCH_CUDA_ARCH_LIST: expected .* got {re.escape(repr(CODES[chips]))}$",
        ):
            module["gencode"](nvcc)


class Builder:
    """BuildNative with CMake replaced; the files it makes say which build they are of."""

    def __init__(self, module, package, monkeypatch, torch_cuda="13.0"):
        self.package, self.module, self.asked = package / "ecar_kernels", module, []
        self.fails, self.number = {}, 0
        monkeypatch.setitem(module, "ROOT", package)
        monkeypatch.setitem(module, "find_tool", lambda name: name)
        monkeypatch.setitem(module, "find_torch", lambda: package)
        monkeypatch.setitem(
            module, "torch_says", lambda _, name: torch_cuda if name == "cuda" else "2.10.0"
        )
        monkeypatch.setitem(module, "find_nvcc", lambda: self.asked.append("nvcc") or "nvcc")
        monkeypatch.setitem(module, "gencode", lambda _: ["arch=compute_90,code=sm_90"])
        monkeypatch.setitem(module, "run", self.make)

    def make(self, command, log):
        half = "cuda" if "--target" in command else "cpu"
        (log.parent / "CMakeCache.txt").touch()
        if "--build" in command:
            if error := self.fails.get(half):
                raise error
            (log.parent / f"libecar_{half}.so").write_text(f"{half} {self.number}")

    def build(self, **fails):
        self.fails, self.number = fails, self.number + 1
        command = self.module["BuildNative"](setuptools.Distribution())
        command.inplace, command.editable_mode = True, False
        command.run()

    def files(self) -> dict[str, str]:
        return {file.name: file.read_text() for file in self.package.iterdir()}


REQUIRED = [  # ECAR_REQUIRE_NATIVE, torch has CUDA, the half that fails; error, halves installed
    *(
        (value, cuda, None, False, ("cpu", "cuda") if cuda or value == "cuda" else ("cpu",))
        for value in (None, "", "0", "1", "cpu", "cuda")
        for cuda in (False, True)
    ),
    *(
        (value, True, "cuda", value in ("1", "cuda"), ("cpu",))
        for value in ("", "0", "1", "cpu", "cuda")
    ),
    ("cuda", False, "cuda", True, ()),
    ("1", False, "cuda", False, ("cpu",)),
    *(
        (value, cuda, "cpu", value in ("1", "cpu", "cuda"), ())
        for value in ("", "0", "1", "cpu", "cuda")
        for cuda in (False, True)
    ),
]


@pytest.mark.parametrize("value, cuda, fails, error, halves", REQUIRED)
def test_required_halves(value, cuda, fails, error, halves, module, tmp_path, monkeypatch):
    if value is not None:
        monkeypatch.setenv("ECAR_REQUIRE_NATIVE", value)
    builder = Builder(module, tmp_path, monkeypatch, "13.0" if cuda else None)
    failure = {fails: module["CannotBuildError"]("a reason")} if fails else {}
    with (
        pytest.raises(SystemExit, match=r"cannot be built: .*a reason")
        if error
        else contextlib.nullcontext()
    ):
        builder.build(**failure)
    files = builder.files()
    assert not error or not files
    if not error:
        assert {f"libecar_{half}.so" for half in halves} == {n for n in files if n.endswith("so")}
        assert (_native.WHY_NOT_BUILT in files) == ("cpu" not in halves)
        assert (_native.WHY_NOT_CUDA in files) == (halves == ("cpu",))
        if halves == ("cpu",):
            reason = "a reason" if fails and cuda else "torch is built without CUDA"
            assert files[_native.WHY_NOT_CUDA] == f"{reason} (when ecar was installed)\n"
    # Where torch has no CUDA, nvcc is not even looked for, unless the CUDA half is asked for.
    assert builder.asked == (["nvcc"] if cuda or value == "cuda" else [])


@pytest.mark.parametrize("value", ["2", "yes", "true", "CPU", "cpu,cuda", " 1"])
def test_what_is_required_is_no_other_word(value, module, tmp_path, monkeypatch):
    monkeypatch.setenv("ECAR_REQUIRE_NATIVE", value)
    with pytest.raises(
        SystemExit,
        match="ECAR_REQUIRE_NATIVE: expected 1, cpu, cuda or 0, got " + re.escape(repr(value)),
    ):
        Builder(module, tmp_path, monkeypatch).build()


class TestRebuild:
    """The library in the tree is replaced at the end, or not at all."""

    @pytest.fixture
    def builder(self, module, tmp_path, monkeypatch):
        builder = Builder(module, tmp_path, monkeypatch)
        builder.build()
        return builder

    def test_a_running_process_keeps_its_file(self, builder):
        with open(builder.package / "libecar_cpu.so") as held:
            builder.build()
            assert held.read() == "cpu 1"
        assert builder.files() == {"libecar_cpu.so": "cpu 2", "libecar_cuda.so": "cuda 2"}

    @pytest.mark.parametrize("half", ["cpu", "cuda"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
    def test_interrupted(self, builder, half, error):
        before = builder.files()
        with pytest.raises(error):
            builder.build(**{half: error()})
        assert builder.files() == before

    def test_failed(self, builder, module, capsys, monkeypatch):
        """The old one serves, and it is said; the next build that succeeds takes the note away."""
        before, reason = builder.files(), module["CannotBuildError"]("no memory")
        builder.build(cpu=reason)
        note = "no memory (when ecar was installed)\n"
        assert builder.files() == before | {_native.WHY_NOT_BUILT: note}
        said = "the C++ library stays that of an earlier build: no memory"
        assert said in capsys.readouterr().err
        monkeypatch.setattr(_native, "FOLDER", builder.package)
        assert _native.outdated() == note.strip()
        builder.build()
        assert builder.files() == {"libecar_cpu.so": "cpu 3", "libecar_cuda.so": "cuda 3"}
        assert _native.outdated() is None

    def test_halves_are_of_one_build(self, builder, module):
        """What the new CPU half defines, an old CUDA half may implement otherwise."""
        builder.build(cuda=module["CannotBuildError"]("no memory"))
        assert set(builder.files()) == {"libecar_cpu.so", _native.WHY_NOT_CUDA}

    def test_a_full_disk(self, builder, monkeypatch):
        before = builder.files()

        def write(path, content):
            if b"cuda" in content:
                raise OSError(28, "No space left on device")
            return len(path.open("wb").write(content) * " ")

        monkeypatch.setattr(Path, "write_bytes", write)
        with pytest.raises(OSError, match="No space left"):
            builder.build()
        assert builder.files() == before

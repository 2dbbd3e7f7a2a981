"""setup.py's functions: the tools that it takes, what it asks for, and what a build replaces.

Nothing is built here; test_build.py builds.
"""

import contextlib
import os
import re
import runpy
from pathlib import Path

import pytest
import setuptools

from ecar_kernels import _native
from tests.test_build import script

ROOT = Path(__file__).parent.parent


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

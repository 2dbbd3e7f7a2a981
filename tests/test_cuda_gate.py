"""The CUDA gate's --changed compiles and compares what it must; nvcc is a stand-in here."""

import shutil

import pytest

from tools import cuda_gate
from tools.cuda_gate import CHIPS, Row

HEADER = "csrc/include/ecar/philox.h"  # of flow_step.cu, by way of flow_step.cuh


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """Returns run(...) -> (exit status, chips compiled for), with a page of all chips written;
    the sources are a copy, `registers` what every kernel takes, `version` nvcc's."""
    shutil.copytree(cuda_gate.ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(cuda_gate, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_gate, "SOURCE", tmp_path / "csrc" / "cuda" / "flow_step.cu")
    monkeypatch.setattr(cuda_gate, "INCLUDES", (tmp_path / "csrc", tmp_path / "csrc" / "include"))
    nvcc = tmp_path / "nvcc"
    compiled = []

    def compile_for(chip, *_):
        compiled.append(chip)
        problem = "registers spill" if run.registers > 255 else ""
        return [Row(chip, "euler float32 wide", run.registers, 0, 0, 3, 1, problem)]

    def run(*arguments):
        nvcc.write_text(f"#!/bin/sh\necho 'release 13.0, V{run.version}'\n", "utf-8")
        nvcc.chmod(0o755)
        compiled.clear()
        code = cuda_gate.main(["--output", str(tmp_path / "page.md"), *arguments])
        return code, tuple(sorted(compiled, key=CHIPS.index))

    run.registers, run.version, run.folder = 32, "13.0.1", tmp_path
    monkeypatch.setattr(cuda_gate, "find", lambda name: str(nvcc))
    monkeypatch.setattr(cuda_gate, "compile_for", compile_for)
    assert run() == (0, CHIPS)
    return run


def change(gate, **more):
    if more.pop("source", False):
        header = gate.folder / HEADER
        header.write_text(header.read_text("utf-8") + "\n// Another line.\n", "utf-8")
    vars(gate).update(more)


@pytest.mark.parametrize(
    ("changes", "code", "chips"),
    [
        ({}, 0, cuda_gate.SAMPLE),
        ({"registers": 33}, 1, cuda_gate.SAMPLE),
        ({"source": True}, 0, CHIPS),
        ({"source": True, "registers": 33}, 1, CHIPS),
        ({"version": "13.0.2"}, 0, CHIPS),
        ({"version": "13.0.2", "registers": 33}, 0, CHIPS),  # another compiler's numbers
        ({"version": "13.0.2", "registers": 256}, 1, CHIPS),
    ],
)
def test_what_changed_is_compiled_and_compared(gate, changes, code, chips):
    before = (gate.folder / "page.md").read_text("utf-8")
    change(gate, **changes)
    assert gate("--changed") == (code, chips)
    assert (gate.folder / "page.md").read_text("utf-8") == before


def test_the_page_written_is_of_what_is_there_now(gate):
    change(gate, source=True, registers=33)
    assert gate() == (0, CHIPS)
    assert gate("--changed") == (0, cuda_gate.SAMPLE)


def test_a_page_that_lost_a_row_differs(gate):
    page = gate.folder / "page.md"
    lines = page.read_text("utf-8").splitlines(keepends=True)
    page.write_text("".join(line for line in lines if "sm_90" not in line), "utf-8")
    assert gate("--changed")[0] == 1

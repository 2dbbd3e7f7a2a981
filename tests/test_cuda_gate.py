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


def test_a_page_that_lost_a_row_or_a_chip_differs(gate):
    page = gate.folder / "page.md"
    text = page.read_text("utf-8")
    page.write_text("".join(t for t in text.splitlines(keepends=True) if "euler" not in t), "utf-8")
    assert gate("--changed")[0] == 1
    page.write_text(text.replace("sm_90", "sm_91"), "utf-8")
    assert gate("--changed")[0] == 1


def test_a_cell_has_registers_loads_and_what_spills():
    row = Row("sm_90", "euler float32 wide", 32, 0, 0, 3, 1)
    assert cuda_gate.cell(row) == "32 (3, 1)"
    assert cuda_gate.cell(Row("sm_90", "x", 255, 8, 4)) == "255 (-, -), 8 stack, 4 spilled"
    page = cuda_gate.page([row], "nvcc V1")
    assert cuda_gate.recorded_cells(page) == {("euler float32 wide", "sm_90"): "32 (3, 1)"}
    assert cuda_gate.differences([row], page) == []
    slower = Row("sm_90", "euler float32 wide", 33, 0, 0, 3, 1)
    said = ["euler float32 wide sm_90: 32 (3, 1) on the page, 33 (3, 1) here"]
    assert cuda_gate.differences([slower], page) == said


def test_an_access_before_the_wait_is_seen():
    wait, prefetch = "ACQBULK ;", "CCTL.E.PF2 [R4] ;"
    for access in ("@P0 LDG.E.128 R4, desc[UR4][R2.64] ;", "STG.E [R2], R4 ;", "REDG.E.ADD [R2] ;"):
        assert cuda_gate.touches_memory_early(f"{prefetch} {access} {wait}")
        assert cuda_gate.touches_memory_early(f"{prefetch} {access}")
        assert not cuda_gate.touches_memory_early(f"LDC R1, c[0x0] ; {prefetch} {wait} {access}")

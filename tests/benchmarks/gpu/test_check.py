"""The parts of `make gpu-check`, as far as they need no GPU."""

import os
from pathlib import Path

from benchmarks.gpu import build, check, work
from ecar_kernels.registry import BoundOp


def test_a_gpu_without_the_cuda_half_stops_it(tmp_path, monkeypatch):
    """What is carried does not fit: a row says why, the build is tried, and what loads counts."""
    ran = []
    monkeypatch.setattr(build._native, "why_not_cuda", lambda: "the CUDA half is not built")
    monkeypatch.setattr(work, "run", lambda argv, *more: ran.append(argv) or (0, ""))
    monkeypatch.setattr(build.torch.cuda, "get_device_capability", lambda: (9, 0))
    found = work.Work("check", "build", carried=tmp_path)
    build.build(found)
    carried, built, half = found.rows
    assert "manifest.json" in carried["why_not"]
    assert built["ok"] and ran[0][1:] == ["setup.py", "build_ext", "--inplace"]
    assert half["name"] == "CUDA half"
    assert (half["ok"], half["stop"]) == (False, "the CUDA half is not built")
    # A library of an earlier build is no way out of a build that fails.
    monkeypatch.setattr(build._native, "why_not_cuda", lambda: None)
    monkeypatch.setattr(work, "run", lambda *arguments: (1, "nvcc\nerror: x\n"))
    build.build(found := work.Work("check", "build"))
    assert found.rows[-1]["stop"] == "the build failed: error: x"


def test_words_choose_rows():
    found = work.Work("check", "accuracy", dry=True, words=("euler_step", "plain"))
    check.accuracy(found)
    assert [row["op"] for row in found.rows] == ["euler_step"] * 3


def test_a_wrong_op_is_a_row_that_fails(monkeypatch):
    real = check.calls

    def wrong(*arguments):
        for call in real(*arguments):
            if (run := call.run).op == "euler_step":
                more = BoundOp(run.implementation, lambda run=run, **given: run(**given) + 1)
                yield call._replace(run=more)

    monkeypatch.setattr(check, "calls", wrong)
    found = work.Work("check", "accuracy", dry=True)
    check.accuracy(found)
    assert [row["ok"] for row in found.rows] == [False] * 6


def test_only_files_with_gpu_tests_are_collected():
    """Others may import what a machine with a GPU does not have; the sampler's come first."""
    chosen = check.suites()["marked gpu"]
    assert chosen[:3] == ["-m", "gpu", "tests/ecar/sampling/test_graph_gpu.py"]
    assert "tests/ecar/test_pipeline.py" not in chosen
    kernels = ("flow_block_triton", "stage_attention_triton", "adaln_triton")
    expected = {f"test_{name}" for name in ("flow_step", "flow_boundary", *kernels)}
    assert {Path(name).stem for name in chosen[3:]} >= expected


def test_what_memcheck_watches_is_every_op_on_small_tensors():
    watched = work.Work("check", "warm", dry=True, words=("small",))
    items = dict(check.warm_items(watched))
    assert f"adaln {check.KERNELS[0]} bfloat16 small views" in items
    for name, item in items.items():
        assert watched.chosen(name)
        item()


def test_tests_are_named_as_they_end(tmp_path, capsys):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip()\n"
    )
    found = work.Work("check", "tests")
    check.run_tests(
        found, "mine", ["-c", os.devnull, f"--rootdir={tmp_path}", str(tmp_path / "test_it.py")]
    )
    failed, suite = found.rows
    assert failed["name"].endswith("test_b") and failed["ok"] is False
    assert suite["counts"] == {"passed": 1, "failed": 1, "skipped": 1} and suite["ok"] is False
    assert "assert 0" in suite["output"]
    assert "test_a: passed" in capsys.readouterr().out

"""The parts of `make gpu-check`, as far as they need no GPU."""

from pathlib import Path

import pytest

from benchmarks.gpu import build, check
from benchmarks.gpu.work import Work
from ecar_kernels.registry import BoundOp


def test_a_gpu_without_the_cuda_half_stops_it(tmp_path, monkeypatch):
    """What is carried does not fit: a row says why, the build is tried, and what loads counts."""
    ran, results = [], {}

    def run(work, name, command, **environment):
        ran.append((name, command))
        return results.get(name)

    monkeypatch.setattr(build._native, "why_not_cuda", lambda: "the CUDA half is not built")
    monkeypatch.setattr(Work, "run", run)
    monkeypatch.setattr(build.torch.cuda, "get_device_capability", lambda: (9, 0))
    found = Work("check", "build", carried=tmp_path)
    with pytest.raises(build.StoppedError, match="the CUDA half is not built"):
        build.build(found)
    assert "manifest.json" in found.rows[0]["why_not"]
    assert [(name, command[1:]) for name, command in ran] == [
        ("build", ["setup.py", "build_ext", "--inplace"])
    ]
    # A library of an earlier build is no way out of a build that fails.
    monkeypatch.setattr(build._native, "why_not_cuda", lambda: None)
    results["build"] = "error: x"
    with pytest.raises(build.StoppedError, match="the build failed: error: x"):
        build.build(Work("check", "build"))


def test_words_choose_rows():
    found = Work("check", "accuracy", dry=True, words=("euler_step", "plain"))
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
    found = Work("check", "accuracy", dry=True)
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
    watched = Work("check", "warm", dry=True, words=("small",))
    items = dict(check.warm_items(watched))
    assert f"adaln {check.KERNELS[0]} bfloat16 small views" in items
    for name, item in items.items():
        if watched.begins(name, 0):
            item()

"""`ecar tune` from its command line to its file, where a launch takes a millisecond."""

import dataclasses
import json

import pytest
import torch

from ecar.cli import main
from ecar_kernels import resolve, tune, tuning
from ecar_kernels.stage_attention import launch
from tools.fake_gpu import H100, FakeGPU, chip_of


@pytest.fixture(autouse=True)
def nothing_stays_known():
    yield
    tuning.forget()


def entries(path, name):
    return {
        (entry["op"], *entry["key"], entry["rows"]): entry for entry in tuning.entries(path, name)
    }


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_the_whole_command(tmp_path, monkeypatch, capsys, device):
    """Every problem of a width is measured on the device that is named, and the choice is read by
    the next call there. Fewer launches are faster here: no product is split."""
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(tmp_path))
    chips = H100, chip_of(120)
    name = chips[int(device[-1])].name
    path = tmp_path / tuning.file_name(name)
    with FakeGPU(*chips, compile_kernels=False, values=True) as gpu:
        assert main(["tune", "--width", "128", "--rows", "64", "--device", device]) == 0
        assert {launch.device for launch in gpu.launches} == {int(device[-1])}
        found = entries(path, name)
        x = torch.zeros(1, 64, 128, dtype=torch.bfloat16, device=device)
        weight = torch.zeros(384, 128, dtype=torch.bfloat16, device=device)
        key = ("adaln_linear", 384, 128, 2, "ieee", 64)
        gpu.clear()
        with torch.no_grad():
            resolve("adaln_linear", device=device, dtype=x.dtype)(x, x, x, weight, weight[:, 0])
        its = found[key]["settings"]
        launched = [launch for launch in gpu.launches if launch.name == "adaln_linear"]
        assert [(launch.num_warps, launch.num_stages) for launch in launched] == [
            (its["num_warps"], its["num_stages"])
        ]
    printed = capsys.readouterr().out
    assert f"{len(found)} choices measured" in printed
    assert {key[0] for key in found} == {
        "adaln",
        "adaln_backward",
        "gated_residual",
        "gated_residual_backward",
        "gated_residual_adaln",
        "gated_residual_adaln_backward",
        "adaln_linear",
        "linear_gated_residual",
    }
    for entry in found.values():
        assert entry["microseconds"] <= entry["usual_microseconds"]
    kept = json.loads(path.read_text("utf-8"))
    assert kept["torch"] == torch.__version__
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("queries", [16, 80])
def test_attention(queries):
    """Of the newest tokens and of all, forward and backward; each candidate is captured."""
    with FakeGPU(compile_kernels=False, values=True) as gpu, tune.measuring(torch.device("cuda")):
        stream = torch.cuda.current_stream()
        problems = tune.problems(
            tune.Shape(256, 1024, queries, 2, (64, 16), 4), torch.bfloat16, ("stage_attention",)
        )
        assert [problem.op for problem in problems] == [
            "stage_attention",
            "stage_attention_keys",
            "stage_attention_queries",
        ]
        for problem in problems:
            gpu.clear()
            choice = tune.measure(problem)
            assert choice.tried == len(problem.candidates) > 1 and choice.wrong == 0
            begun = [
                entry
                for entry in gpu.log
                if isinstance(entry, tuple) and entry[0] == "capture_begin"
            ]
            assert len(begun) == choice.tried and {entry[2] for entry in begun} == {stream}
            assert not [entry for entry in gpu.launches if entry.captured and entry.kind == "copy"]


def test_attention_of_few_queries_and_many_keys():
    """One program and several for each tile's keys."""
    with FakeGPU(compile_kernels=False, values=True) as gpu, tune.measuring(torch.device("cuda")):
        shares, *_ = tune.problems(
            tune.Shape(256, 1024, 16, 1, (3000, 16), 4), torch.bfloat16, ("stage_attention",)
        )
        assert shares.op == launch.SHARES and shares.usual.shares > 1
        gpu.clear()
        choice = tune.measure(shares)
        assert choice.tried == len(shares.candidates) and choice.wrong == 0
        launched = {its.grid[1]: its.name for its in gpu.launches if its.captured}
    assert set(launched) == {its.shares for its in shares.candidates} >= {1, 2, 4, 8, 16, 32}
    assert {count for count, name in launched.items() if name == "forward_kernel"} == {1}
    assert set(launched.values()) == {"forward_kernel", "split_forward_kernel"}


def test_a_setting_that_the_chip_cannot_hold_is_left_out():
    """Compiled, and refused by Triton's own check: the others are measured all the same."""
    with FakeGPU(values=True), tune.measuring(torch.device("cuda")):
        problem = tune.problems(tune.Shape(128, 512, 64), torch.bfloat16, ("flow_block",))[0]
        large = dataclasses.replace(
            problem.usual,
            block_m=128,
            block_n=128,
            block_k=128,
            num_warps=8,
            num_stages=6,
            prologue=False,
        )
        choice = tune.measure(dataclasses.replace(problem, candidates=(problem.usual, large)))
    assert (choice.settings, choice.tried, choice.wrong) == (problem.usual, 1, 1)

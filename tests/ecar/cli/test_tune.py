"""`ecar tune`: what it measures and keeps, and that it says why it cannot."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch

from ecar.cli import tune as command
from ecar.config import PRESETS, ECARConfig
from ecar_kernels import registry, tune, tuning
from ecar_kernels.flow_block import launch
from ecar_kernels.stage_attention import measured

NAME = "NVIDIA Test (80GB)"


@pytest.fixture
def timed(monkeypatch):
    """The CPU as a GPU that runs Triton's interpreter, where the last one timed is the fastest."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: TRITON_INTERPRET is not set")
    times = iter(range(1_000_000, 0, -1))

    def clock(run):
        seconds = float(next(times))
        return lambda: seconds

    monkeypatch.setattr(tune, "why_not", lambda: None)
    monkeypatch.setattr(tune, "graph_clock", clock)
    monkeypatch.setattr(tune, "GAIN", 1.0)
    monkeypatch.setattr(command, "chosen_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(tune, "measuring", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAME)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tune", "nothing can be measured here: "),
        ("tune --width 64", "--width and --rows: expected both or neither"),
        ("tune --width 64 --rows 8 --preset S", "--preset: not allowed with --width and --rows"),
        ("tune --width 0 --rows 8", "--width: expected a positive whole number"),
        ("tune --dtype float64", "--dtype: invalid choice: 'float64'"),
    ],
)
def test_bad_command_line_or_no_gpu_is_one_line(refused, monkeypatch, line, message):
    monkeypatch.setattr(tune, "why_not", lambda: "torch sees no CUDA GPU")
    assert message in refused(line)


def test_choices_are_kept_beside_those_of_earlier_runs(run, timed, monkeypatch, tmp_path):
    problems = tune.problems
    monkeypatch.setattr(
        tune,
        "problems",
        lambda *given, device, of: problems(*given, ("adaln",), device="cpu", of=of),
    )
    path = tmp_path / "tuned.json"
    line = "tune --width 24 --dtype float32 --output tuned.json --rows "
    code, output, errors = run(line + "3")
    assert (code, errors) == (0, "")
    first = tuning.read(path, NAME)
    assert {op for op, _ in first} == {
        op + end
        for op in ("adaln", "gated_residual", "gated_residual_adaln")
        for end in ("", "_backward")
    }
    assert output.splitlines()[-1] == "tuned.json: 6 choices measured, 6 in all"
    assert run(line + "5")[0] == 0
    both = tuning.read(path, NAME)
    assert all(set(by_rows) == {3, 5} for by_rows in both.values())
    content = json.loads(path.read_text())
    assert content["torch"] == torch.__version__
    assert {"triton", "date"} <= content.keys()


def test_a_file_of_another_gpu_is_not_written_over(run, timed, tmp_path):
    path = tmp_path / "tuned.json"
    tuning.write(path, "Another", [])
    before = path.read_bytes()
    code, _, errors = run("tune --width 24 --rows 3 --output tuned.json")
    assert code == 2
    assert "expected 'device' to be 'NVIDIA Test (80GB)', got 'Another'" in errors
    assert path.read_bytes() == before


def test_a_preset_is_measured_as_it_is_sampled_and_trained(run, timed, monkeypatch):
    """Rows of each stage and of all, and attention of each stage to those before it."""
    config = ECARConfig(
        stage_sides=(4, 8), channels=1, width=32, heads=2, ar_layers=1, flow_blocks=1, num_classes=2
    )
    monkeypatch.setitem(PRESETS, "tiny", config)
    asked = []
    monkeypatch.setattr(tune, "problems", lambda *given, **how: asked.append((*given, how)) or [])
    code, _, errors = run("tune --preset tiny --batch 3 --output t.json")
    assert (code, errors) == (0, "")
    assert asked == [
        (tune.Shape(32, 128, count, 3, stages, 2), torch.bfloat16, {"device": "cuda", "of": of})
        for of in ("launches", "backends")
        for count, stages in ((4, (4,)), (16, (4, 16)), (20, (4, 16)))
    ]
    assert [shape.rows for shape, *_ in asked] == [12, 48, 60] * 2


def test_only_a_cuda_device_is_measured(refused, monkeypatch):
    monkeypatch.setattr(tune, "why_not", lambda: None)
    assert refused("tune --device cpu") == "--device: expected a CUDA device, got 'cpu'"


@pytest.mark.gpu
def test_a_gpu_is_measured():
    """Graphs of forward and of backward; few settings, because each is compiled."""
    with tune.measuring(torch.device("cuda")):
        problems = [
            *tune.problems(tune.Shape(128, 512, 64), torch.bfloat16, ("adaln",)),
            *tune.problems(
                tune.Shape(128, 512, 64, 1, (16, 64), 4), torch.bfloat16, ("stage_attention",)
            ),
        ]
        for problem in problems:
            choice = tune.measure(replace(problem, candidates=problem.candidates[:3]), rounds=2)
            assert choice.seconds > 0
            assert choice.tried > 0
            assert choice.settings in problem.candidates


@pytest.fixture
def libraries_serve_the_cpu(monkeypatch):
    """Triton's interpreter and PyTorch's flash attention, asked about as if the CPU were a GPU."""
    found = registry.IMPLEMENTATIONS["stage_attention"]
    for name in found:
        serves = name in ("triton", "sdpa_flash")
        missing = (lambda: None) if serves else (lambda: "not here")
        its = replace(found[name], devices=None, named_only=(), missing=missing, missing_on={})
        monkeypatch.setitem(found, name, its)
    monkeypatch.setattr(registry, "_servers", {})
    monkeypatch.setattr(registry, "_resolved", {})


def test_backends_of_attention_are_measured(timed, libraries_serve_the_cpu, run, monkeypatch):
    """In inference, and in training those whose gradients do not vary; the next call reads it."""
    shape = tune.Shape(16, 64, 5, 2, (3, 5))
    found = tune.problems(
        shape, torch.bfloat16, ("stage_attention", "adaln"), device="cpu", of="backends"
    )
    assert [problem.key[2] for problem in found] == ["inference", "training"]
    for problem, tried in zip(found, (["triton", "sdpa_flash"], ["triton"]), strict=True):
        assert (problem.op, problem.rows) == (measured.OP, 2)
        assert problem.key == (16, "bfloat16", problem.key[2], 5, 3, 5)
        assert [its.backend for its in problem.candidates] == tried
        choice = tune.measure(problem, rounds=1)
        assert (choice.tried, choice.wrong) == (len(tried), 0)
        assert choice.settings.backend == tried[-1]
        assert choice.entry()["settings"] == {"backend": tried[-1]}
    monkeypatch.setattr(tune, "problems", lambda *_, of, **__: found if of == "backends" else [])
    code, output, errors = run("tune --width 16 --rows 5 --output t.json")
    assert (code, errors) == (0, "")
    assert "stage_attention_backend 16 bfloat16 inference 5 3 5, 2 rows: sdpa_flash, " in output


def test_attention_is_measured_forward_and_backward(timed):
    found = tune.problems(
        tune.Shape(16, 64, 5, 2, (3, 5)), torch.float32, ("stage_attention",), device="cpu"
    )
    assert [problem.op for problem in found] == [
        "stage_attention",
        "stage_attention_keys",
        "stage_attention_queries",
    ]
    for problem in found:
        assert (problem.key, problem.rows) == ((16, "exact", 5, 3, 5), 2)
        choice = tune.measure(problem, rounds=1)
        assert choice.wrong == 0
        assert choice.settings == problem.candidates[-1] != problem.usual


@pytest.mark.parametrize("size", ["S", "B", "L"])
def test_products_are_listed_without_a_gpu(run, size):
    """As an H100 would launch them, each with its programs and the time that the model expects."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: its own settings are listed")
    code, printed, errors = run(f"tune --list --preset {size} --batch 1")
    assert (code, errors) == (0, "")
    config = ECARConfig.preset(size)
    assert printed.splitlines()[0] == f"width {config.width}"
    for rows in config.stage_tokens:
        lines = [line for line in printed.splitlines() if line.startswith(f"{rows:>6} rows")]
        assert [line.partition("(")[2].partition(")")[0] for line in lines] == [
            "qkv",
            "proj",
            "fc1",
            "fc2",
        ]
        its = launch.default(rows, config.width, 4 * config.width, 2, "ieee", 132, 90)
        time = launch.nanoseconds(its, rows, config.width, 4 * config.width, 2, "ieee", 132)
        assert lines[3].endswith(
            f"{launch.programs(its, rows, config.width)} programs of {its.block_m}x{its.block_n}x"
            f"{its.block_k}, {its.num_stages} stages: {time / 1000:.1f} us"
        )
        assert [", which normalise" in line for line in lines] == [True, False, True, False]

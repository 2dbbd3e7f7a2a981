"""The sweep over solvers, grids and splits: what is tried, measured, shown, drawn and written."""

import itertools
import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from ecar.evaluation import best_row, steps, sweep_steps, write_best
from ecar.evaluation.chart import _Axis, draw_steps
from ecar.evaluation.dtypes import cast_and_compare
from ecar.evaluation.steps import CALLS_A_STEP, candidates, frontier
from ecar.pipeline import ECARPipeline
from ecar.sampling import sample

NAMES = [f"class {number}" for number in range(10)]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Three rounds of timing, however short."""
    monkeypatch.setattr(steps, "TIMED_SECONDS", 0.0)


@pytest.fixture
def pipe(model):
    # Weights at which trajectories converge soon.
    with torch.no_grad():
        for head in model.heads:
            head.output.weight.mul_(0.1)
    defaults = {"guidance_scale": 1.5, "num_inference_steps": 5}
    return ECARPipeline(model, class_names=NAMES, defaults=defaults)


@pytest.fixture
def report(pipe):
    return sweep_steps(pipe, calls=[4, 6, 9], images=3, first_seed=5, progress=False)


def test_a_cast_is_measured_by_the_same_latents(pipe):
    labels, seeds = torch.tensor([0, 4, 9]), torch.arange(5, 8)

    def latents(**settings):
        settings = {"guidance_scale": 1.5, **settings}
        return sample(pipe.model, labels, seeds=seeds, **settings).latents.double()

    def distance(one, other):
        return ((one - other).square().mean() / other.square().mean()).sqrt().item()

    own = latents(steps=5)
    found = cast_and_compare(
        pipe, torch.bfloat16, images=3, first_seed=5, progress=False, **pipe.defaults
    )
    assert pipe.dtype == torch.bfloat16
    assert found["distance"] == pytest.approx(distance(latents(steps=5), own), rel=1e-3)
    pipe.to(torch.float32)  # the weights are rounded now, the exact latents are not
    exact = latents(steps=[found["converged"]["steps_of_a_stage"]] * 2, solver="heun")
    assert 0 < found["distance"] < 0.05 and found["error"] != found["error_before"]
    assert found["error_before"] == pytest.approx(distance(own, exact), rel=0.3)


def test_every_solver_grid_split_and_number_is_tried_once():
    found = candidates(3, [6, 12, 12])
    assert len(found) == len(set(found))
    assert {setting.solver for setting in found} == set(CALLS_A_STEP)
    assert {setting.calls for setting in found} == {6, 12}
    assert {setting.grid for setting in found if setting.calls == 6} == set(steps.GRIDS)
    assert all(min(setting.steps) >= 1 for setting in found)
    (heun,) = {s.steps for s in found if s.solver == "heun" and s.calls == 6}
    assert heun == (1, 1, 1)
    assert not [s for s in candidates(3, [5]) if s.solver == "heun"]  # it would need six


def test_an_error_is_the_distance_to_the_converged_trajectory(report, pipe):
    labels, seeds = torch.tensor([0, 4, 9]), torch.arange(5, 8)  # classes are spread

    def latents(**settings):
        drawn = sample(pipe.model, labels, seeds=seeds, guidance_scale=1.5, **settings)
        return drawn.latents.double()

    facts = report["protocol"]["converged"]
    count = facts["steps_of_a_stage"]
    exact, half, double = (
        latents(steps=[n, n], solver="heun", grid=facts["grid"])
        for n in (count, count // 2, 2 * count)
    )
    scale = exact.square().mean().sqrt()
    moved = (exact - half).square().mean().sqrt() / scale
    rounding = 2e-4  # of a random model, which enlarges it
    told = facts["moved_by_the_last_doubling"]
    assert told == pytest.approx(moved.item(), rel=1e-3, abs=rounding)
    assert (double - exact).square().mean().sqrt() / scale < moved + rounding
    assert told <= steps.CONVERGED
    for row in (report["paper"], *report["rows"][:4]):
        found = latents(steps=row["steps"], solver=row["solver"], grid=row["grid"])
        error = (found - exact).square().mean().sqrt() / scale
        assert row["error"] == pytest.approx(error.item(), rel=1e-3, abs=rounding)


def test_costs_are_counted_and_measured(report):
    tokens = report["protocol"]["stage_tokens"]
    assert report["paper"]["steps"] == [125, 125]
    for row in (report["paper"], *report["rows"]):
        calls = [CALLS_A_STEP[row["solver"]] * count for count in row["steps"]]
        assert row["calls"] == sum(calls)
        assert row["calls_x_tokens"] == sum(c * n for c, n in zip(calls, tokens, strict=True))
        assert row["seconds"] > 0
        assert 0 < row["standard_error"] < row["error"]
    assert report["paper"]["seconds"] > min(row["seconds"] for row in report["rows"])


def test_a_report_has_the_frontier_and_the_best_of_each_solver(report):
    rows = report["rows"]
    assert {row["solver"] for row in rows} == {"euler", "heun", "ab2"}
    assert {row["calls"] for row in rows} == {4, 6, 8, 9}  # Heun's nine are eight
    shown = frontier(rows)
    assert shown
    for cheaper, dearer in itertools.pairwise(shown):
        assert cheaper["calls_x_tokens"] < dearer["calls_x_tokens"]
        assert cheaper["error"] > dearer["error"]
    assert all(
        any(s["calls_x_tokens"] <= r["calls_x_tokens"] and s["error"] <= r["error"] for s in shown)
        for r in rows
    )
    assert report["protocol"]["guidance"]["guidance_scale"] == 1.5
    json.dumps(report)


def row(calls, cost, error):
    return {"calls": calls, "calls_x_tokens": cost, "error": error}


def test_the_best_is_the_cheapest_of_those_near_the_least_error():
    rows = [row(10, 50, 0.2), row(20, 90, 0.104), row(20, 99, 0.1), row(40, 80, 0.01)]
    assert best_row({"rows": rows}, 39) is rows[1]
    assert best_row({"rows": rows}, 40) is rows[3]
    assert best_row({"rows": rows}, 19) is rows[0]
    with pytest.raises(ValueError, match="argument 'calls': expected at least 10, got 9"):
        best_row({"rows": rows}, 9)


def test_a_model_and_other_guidance(model, pipe):
    given = {"calls": [4], "images": 2, "progress": False, "batch_size": 1}
    found = sweep_steps(model.train(), guidance_scale=1.0, **given)
    assert model.training
    assert found["protocol"]["guidance"]["guidance_scale"] == 1.0
    other = sweep_steps(pipe, guidance_scale=1.0, **{**given, "batch_size": 2})
    for a, b in zip(found["rows"], other["rows"], strict=False):
        assert a["error"] == pytest.approx(b["error"], rel=1e-3)


def test_the_bar_says_what_is_measured(pipe, capsys):
    sweep_steps(pipe, calls=[4], images=1)
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("converging", "measuring errors: 100%", "round 1 of"))


def test_an_interrupted_sweep_leaves_the_pipeline_as_it_was(pipe, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ecar.pipeline.sample", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep_steps(pipe, calls=[4], images=1, progress=False)
    assert pipe.graphs == "auto"


def test_trajectories_that_do_not_converge_are_refused(pipe, monkeypatch):
    monkeypatch.setattr(steps, "MOST_STEPS", 64)
    monkeypatch.setattr(steps, "CONVERGED", 0.0)
    with pytest.raises(ValueError, match=r"'source': .* from 32 to 64 Heun steps .* still move by"):
        sweep_steps(pipe, calls=[4], images=1, progress=False)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"calls": [1]}, ValueError, r"'calls': expected numbers of at least 2.*got \[1\]"),
        ({"calls": []}, ValueError, "'calls'.*got"),
        ({"calls": [4.5]}, TypeError, "'calls': expected an integer, got 4.5"),
        ({"images": 0}, ValueError, "'images': expected at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "'batch_size'.*got 0"),
        ({"solver": "ab2"}, TypeError, "'solver': expected guidance_scale"),
        ({"guidance_scale": math.nan}, ValueError, "'guidance_scale'.*nan"),
    ],
)
def test_bad_arguments_are_named(pipe, given, error, message):
    with pytest.raises(error, match=f"argument {message}"):
        sweep_steps(pipe, **{"progress": False, "images": 1, "calls": [4], **given})


def chosen(stages=2):
    return {"steps": [3, 2, 1][:stages], "solver": "ab2", "grid": 1.75}


def test_the_best_becomes_the_default_and_all_else_stays(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    path = write_best(tmp_path, chosen())
    assert path == tmp_path / "pipeline.json"
    assert {p for p in tmp_path.iterdir() if p.read_bytes() != before[p]} == {path}
    loaded = ECARPipeline.from_pretrained(tmp_path)
    assert loaded.class_names == NAMES
    changed = {"num_inference_steps": [3, 2], "solver": "ab2", "grid": 1.75}
    assert loaded.defaults == {**pipe.defaults, "guidance_interval": [0.0, 1.0], **changed}


def test_a_folder_without_pipeline_json_gets_one(pipe, tmp_path):
    pipe.model.save_pretrained(tmp_path)
    write_best(tmp_path, chosen())
    assert ECARPipeline.from_pretrained(tmp_path).defaults["num_inference_steps"] == [3, 2]


def test_what_cannot_be_written_is_named(pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint 'owner/name': no such folder"):
        write_best("owner/name", chosen())
    (tmp_path / "pipeline.json").write_text("{")
    with pytest.raises(ValueError, match=r"pipeline.json: not valid JSON"):
        write_best(tmp_path, chosen())
    assert (tmp_path / "pipeline.json").read_text() == "{"


def test_the_picture_has_a_line_for_each_solver_and_both_marks(report, tmp_path):
    best = best_row(report, 9)
    path = draw_steps(report, tmp_path / "steps.svg", best, "a & b")
    root = ElementTree.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{space}text")]
    assert {"a & b", "euler", "heun", "ab2", "seconds of one image"} <= set(texts)
    assert "network calls x tokens" in texts
    lines = [element.get("stroke") for element in root.iter(f"{space}polyline")]
    for colour in ("#E69F00", "#009E73", "#0072B2", "#bbbbbb"):
        assert lines.count(colour) == 3  # two panels and the legend
    for element in root.iter(f"{space}circle"):
        assert 0 < float(element.get("cx")) < 860
        assert 0 < float(element.get("cy")) < 400
    with pytest.raises(ValueError, match=r"'picture': .* ends in .svg, got .*steps.png"):
        draw_steps(report, tmp_path / "steps.png", best, "")


def test_an_axis_has_ticks_within_its_values():
    axis = _Axis([0.03, 4.0], 100, 500)
    assert axis.ticks() == [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]  # and a margin
    assert 100 < axis(0.03) < axis(1.0) < axis(4.0) < 500
    assert _Axis([2.0, 2.0], 0, 10)(2.0) == 5

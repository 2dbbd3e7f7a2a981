"""`ecar steps`: a table, a report, a picture and the checkpoint's new default; or one line."""

import json
import re

import pytest

from ecar.evaluation import steps
from ecar.pipeline import ECARPipeline

LINE = "steps --checkpoint model --images 2 --no-progress"


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Small numbers, and random weights are not asked to converge."""
    monkeypatch.setattr("ecar.cli.steps.CALLS", (4, 6))
    monkeypatch.setattr(steps, "CONVERGED", 1.0)
    monkeypatch.setattr(steps, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(steps, "GRIDS", (1.0, 1.5))
    monkeypatch.setattr(steps, "FIRST_STEPS", 4)


def test_everything_is_written(folder, run):
    before = json.loads((folder / "model" / "pipeline.json").read_text())
    code, output, errors = run(f"{LINE} --calls 5 --output x.json --picture x.svg --write")
    assert (code, errors) == (0, "")
    *table, wrote, drew, path = output.splitlines()
    assert (wrote, drew, path) == ("x.json", "x.svg", "model/pipeline.json")
    (best,) = [line for line in table if line.endswith("  best")]
    (paper,) = [line for line in table if line.endswith("  the paper's")]
    assert re.match(r" +250 +euler +1 +125 \+ 125 +2,500 +\d\.\d{4} \+- ", paper)
    report = json.loads((folder / "x.json").read_text())
    assert report["checkpoint"] == "model"
    assert report["protocol"]["tried"]["calls"] == [4, 5, 6]
    after = json.loads((folder / "model" / "pipeline.json").read_text())
    defaults = after["defaults"]
    assert sum(defaults["num_inference_steps"]) <= 5
    assert " + ".join(map(str, defaults["num_inference_steps"])) in best
    changed = {name: defaults[name] for name in ("num_inference_steps", "solver", "grid")}
    assert after == {**before, "defaults": {**before["defaults"], **changed}}
    pipe = ECARPipeline.from_pretrained(folder / "model")
    assert pipe.defaults["num_inference_steps"] == defaults["num_inference_steps"]


def test_nothing_is_written_unasked(folder, run):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, *_ = run(f"{LINE} --guidance 1.5 --seed 3 --batch-size 1")
    assert code == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_ctrl_c_leaves_everything_as_it_was(folder, run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ecar.evaluation.steps.Sweep.time", interrupt)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, output, errors = run(f"{LINE} --output x.json --picture x.svg --write")
    assert (code, output, errors) == (130, "", "ecar: interrupted\n")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--calls 1", "--calls: expected numbers of at least 2"),
        ("--calls 0", "--calls: expected a positive whole number, got '0'"),
        ("--images 0", "--images: expected a positive whole number, got '0'"),
        ("--picture x.png", "--picture: expected a name that ends in .svg, got x.png"),
        ("--output model/config.json/x.json", "config.json: is not a folder"),
        ("--guidance nan", "--guidance: expected a finite number, got nan"),
        ("--solver ab2", "unrecognized arguments: --solver ab2"),
        ("--device gpu", "--device: cannot use 'gpu' here"),
    ],
)
def test_bad_steps_are_one_line(folder, refused, options, message):
    assert message in refused(f"{LINE} {options}")


def test_a_hub_name_is_not_written_to(folder, refused):
    line = "steps --checkpoint owner/name --write"
    assert refused(line) == "--write: expected a local folder, got owner/name"


def test_what_does_not_converge_is_one_line(folder, refused, monkeypatch):
    monkeypatch.setattr(steps, "CONVERGED", 0.0)
    monkeypatch.setattr(steps, "MOST_STEPS", 8)
    assert "--checkpoint: expected trajectories that converge" in refused(LINE)

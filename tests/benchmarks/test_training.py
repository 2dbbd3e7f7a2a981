"""Trainings that differ in one choice, at a few images and with a small model."""

import os
import signal
import threading

import pytest
import torch

from benchmarks import results
from benchmarks.paper import training
from ecar import ECAR, ECARConfig
from ecar.info import count_parameters

IMAGES = 10 * training.BATCH
FILE = "results/any-cpu/training-mnist.json"


@pytest.fixture
def small(monkeypatch):
    """MNIST's preset, small: seconds."""
    model = ECARConfig.preset("mnist", width=16, heads=2, ar_layers=2, flow_blocks=1)
    monkeypatch.setattr(training, "base_model", lambda dataset: model)
    monkeypatch.setitem(training.SETTINGS, "validation_images", 16)
    return model


@pytest.fixture
def run(small, tmp_path, capsys):
    """Run the command in a folder of its own: what it prints."""

    def command(*arguments):
        folders = {"--results": "results", "--work": "work", "--pictures": "pictures"}
        given = [part for flag, name in folders.items() for part in (flag, str(tmp_path / name))]
        training.main(["--dataset", "mnist", *given, *arguments])
        return capsys.readouterr().out

    return command


def table(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return {
        cells[0]: cells[1:] for cells in ([c.strip() for c in x[1:-1].split("|")] for x in lines)
    }


@pytest.mark.parametrize("dataset", training.DATASETS)
def test_every_training_is_possible_and_its_name_its_own(dataset, tmp_path):
    model = training.base_model(dataset)
    table = training.trainings(model)
    configs = [training.configuration(dataset, model, one, 64_000, tmp_path) for one in table]
    assert len({config.output_dir for config in configs}) == len(table)
    assert {config.steps for config in configs} == {1000}
    base, *others = configs
    assert all((one.replace(output_dir=base.output_dir)) != base for one in others)
    sizes = {one.name: count_parameters(config.model)["total"]
             for one, config in zip(table, configs, strict=True)}  # fmt: skip
    for name in (
        "no AR, as many parameters",
        "wider, half the layers",
        "narrower, twice the layers",
    ):
        assert sizes[name] == pytest.approx(sizes[training.BASE], rel=0.1), name


def test_rows_are_merged_and_drawn(run, tmp_path):
    run("--images", str(IMAGES), "-k", "class", "alone")
    text = run("--images", str(IMAGES), "-k", "equal")
    rows = table(text)
    assert [*rows][1:3] == [training.BASE, "no AR, told the class alone"]  # in the table's order
    base = results.read(tmp_path / FILE)["rows"][0]
    curve = base["curve"]
    assert curve["images"] == [training.BATCH * step for step in range(1, 11)]
    mean = sum(curve[f"loss_{stage}"][-1] for stage in (1, 2, 3)) / 3
    assert curve["loss"][-1] == pytest.approx(mean, rel=1e-4)
    assert rows[training.BASE][2] == f"{curve['loss'][-1]:.4f}"
    assert rows["0.9"][0] == f"{curve['ema_0.9'][-1]:.4f}"
    picture = tmp_path / "pictures" / "training-mnist.png"
    assert picture.is_file()
    # Without --images, from what there is.
    picture.unlink()
    assert run() == text
    assert picture.is_file()
    with pytest.raises(SystemExit):
        run("--images", str(2 * IMAGES))


def test_changes_are_to_the_mean_of_the_seeds():
    def row(*losses):
        return {"curve": {"loss": losses}}

    rows = {training.BASE: row(2.0, 4.0), "GradNorm": row(9.0, 9.0)}
    assert training.base_losses(rows) == [2.0, 4.0]
    assert training.base_losses(rows | {training.SEED: row(4.0, 1.0)}) == [3.0, 2.5]


def test_a_training_told_the_class_alone_never_sees_an_end(run, tmp_path):
    run("--images", str(IMAGES), "-k", "alone")
    model = ECAR.from_pretrained(tmp_path / "work" / "mnist" / "no-ar-told-the-class-alone")
    labels = torch.tensor([1])
    with torch.no_grad():
        one, other = (
            model.ar(labels, [fill(1, *model.config.stage_shape(stage)) for stage in (1, 2)])[0]
            for fill in (torch.zeros, torch.ones)
        )
    assert all(map(torch.equal, one, other))


def test_an_interrupted_training_goes_on(run, tmp_path):
    timer = threading.Timer(0, os.kill, (os.getpid(), signal.SIGINT))
    steps = training.Trainer._train_step

    def interrupted(self, parts):
        if self.step == 4:
            timer.start()
            timer.join()
        steps(self, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Trainer, "_train_step", interrupted)
        with pytest.raises(SystemExit, match="the same command goes on"):
            run("--images", str(IMAGES), "-k", "uncertainty")
    assert not (tmp_path / "results").exists()
    run("--images", str(IMAGES), "-k", "uncertainty")
    (row,) = results.read(tmp_path / FILE)["rows"]
    assert row["curve"]["images"][-1] == IMAGES

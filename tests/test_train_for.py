"""`tools.train_for`: so long at a constant rate, then a decay, then the checkpoint; and on."""

import csv
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from PIL import Image

from ecar.config import PRESETS, ECARConfig
from ecar.model import ECAR
from ecar.pipeline import ECARPipeline
from ecar.training import Trainer
from tools import train_for


@pytest.fixture
def tiny(monkeypatch):
    model = ECARConfig.preset("digits", width=16, heads=2, ar_layers=1, flow_blocks=2)
    monkeypatch.setitem(PRESETS, "digits", model)
    monkeypatch.setitem(train_for.SETTINGS, "warmup_steps", 0)
    monkeypatch.setitem(train_for.SETTINGS, "log_every", 1)


def rates(folder):
    with open(folder / "log.csv", newline="") as file:
        return [float(row["lr"]) for row in csv.DictReader(file)]


def test_trains_decays_and_goes_on(tiny, tmp_path):
    work, output = tmp_path / "run", tmp_path / "out"
    words = ["--seconds", "3", "--dataset", "digits", "--work", str(work), "--output", str(output)]
    words += ["--batch-size", "8"]
    train_for.main(words)
    before = rates(work)
    assert set(before) == {8e-4}
    whole = rates(output)
    assert whole[: len(before)] == before
    decay = whole[len(before) :]
    assert decay and decay == sorted(decay, reverse=True) and decay[0] == 8e-4
    assert decay[-1] == pytest.approx(8e-4 / len(decay), rel=1e-4)

    pipe = ECARPipeline.from_pretrained(output)
    assert pipe.defaults["guidance_scale"] == 2.5 and pipe.class_names[3] == "3"
    assert pipe.model.dtype == torch.float32
    assert json.loads((output / "train.json").read_text())["steps"] == len(whole)
    with Image.open(output / "sheet.png") as sheet:
        assert sheet.height > 10 * 32

    train_for.main(words)
    assert rates(work)[: len(before)] == before and len(rates(work)) > len(before)
    assert set(rates(work)) == {8e-4}


def test_starts_from_a_checkpoint(tiny, tmp_path, capsys):
    """With fewer flow blocks than the preset has."""
    start = ECAR(replace(ECARConfig.preset("digits"), flow_blocks=1))
    start.save_pretrained(tmp_path / "start")
    words = ["--dataset", "digits", "--work", str(tmp_path / "run"), "--batch-size", "8"]
    words += ["--seconds", "3", "--init-from", str(tmp_path / "start")]
    train_for.main([*words, "--output", str(tmp_path / "out")])
    said = f"from: weights of {tmp_path / 'start'}, and 1 more flow blocks in each head"
    assert said in capsys.readouterr().err
    model = ECARPipeline.from_pretrained(tmp_path / "out").model
    assert model.config == ECARConfig.preset("digits")


def test_a_signal_of_the_users_ends_it(tiny, tmp_path, monkeypatch):
    step = Trainer._train_step

    def signalled(self, parts):
        os.kill(os.getpid(), signal.SIGINT)
        step(self, parts)

    monkeypatch.setattr(Trainer, "_train_step", signalled)
    work = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"interrupted; .*run is saved"):
        train_for.main(
            ["--seconds", "600", "--dataset", "digits", "--work", str(work), "--output", "x"]
        )
    assert (work / "state" / "state.safetensors").exists()
    assert not (tmp_path / "run-decayed").exists()


def test_less_time_than_the_warm_up_is_told(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(train_for.SETTINGS, "warmup_steps", 10**6)
    words = ["--seconds", "1", "--dataset", "digits", "--work", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="steps in 1 s, no more than the warm-up"):
        train_for.main([*words, "--output", "x", "--batch-size", "8"])

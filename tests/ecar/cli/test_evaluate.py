"""`ecar evaluate`: a report and an npz, and what is refused before sampling begins."""

import argparse
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from ecar.cli.evaluate import add_arguments, chosen_dataset

ON_BLACK = {"dataset": "folder", "background": "black"}
LINE = "evaluate --checkpoint model --no-progress --samples 20 --steps 2"


@pytest.mark.parametrize("how", ["by flag", "from train.json"])
def test_report_and_samples(folder, run, how):
    option = ""
    if how == "by flag":
        option = "--dataset digits"
    else:
        (folder / "model" / "train.json").write_text('{"dataset": "digits"}')
    code, output, errors = run(
        f"{LINE} {option} --guidance 2 --seed 7 --output report.json --npz samples.npz"
    )
    assert (code, errors) == (0, "")
    assert "Fréchet distance" in output
    assert output.splitlines()[-2:] == ["report.json", "samples.npz"]
    report = json.loads((folder / "report.json").read_text())
    sampling = report["protocol"]["sampling"]
    assert (sampling["num_inference_steps"], sampling["guidance_scale"]) == (2, 2.0)
    assert sampling["seeds"] == [7, 26]
    assert report["protocol"]["generated_images"] == 20
    with np.load(folder / "samples.npz") as archive:
        assert archive["arr_0"].shape == (20, 8, 8, 3)  # ADM's evaluator reads colours


@pytest.fixture
def pictures(folder):
    """A folder of 8 x 8 pictures of ten classes, bright or dark."""
    for split, count in (("train", 4), ("test", 2)):
        for label in range(10):
            place = folder / "pictures" / split / f"c{label}"
            place.mkdir(parents=True)
            for index in range(count):
                level = torch.randint(0, 100, (8, 8), dtype=torch.uint8) + 15 * label
                Image.fromarray(level.numpy()).save(place / f"{index}.png")
    return folder


def test_a_classifier_is_trained_for_any_images(pictures, run):
    code, output, _ = run(
        f"{LINE} --dataset folder --data-root pictures --classifier train --output report.json "
        "--save-classifier c.safetensors --neighbours near.png"
    )
    assert code == 0
    assert output.splitlines()[-3:] == ["report.json", "near.png", "c.safetensors"]
    report = json.loads((pictures / "report.json").read_text())
    used = report["protocol"]["extractor"]
    assert used["metadata"]["dataset"] == "folder"
    assert used["metadata"]["held_out_images"] == "20" and len(used["sha256"]) == 64
    near = report["nearest_training"]
    assert 0 < near["generated"]["least"] <= near["generated"]["median"]
    assert "to nearest training image" in output
    with Image.open(pictures / "near.png") as sheet:
        assert sheet.height > 2 * 2 * 64
    code, again, _ = run(f"{LINE} --dataset folder --data-root pictures --classifier c.safetensors")
    assert code == 0
    assert again.splitlines()[:3] == output.splitlines()[:3]


@pytest.mark.parametrize("trained", [None, "folder", "mnist"])
def test_samples_alone_need_nothing_to_measure_with(pictures, run, monkeypatch, trained):
    """No train.json; a data set without a classifier; one that is nowhere."""
    if trained is not None:
        settings = {"dataset": trained, "data_root": {"folder": "pictures"}.get(trained, "nowhere")}
        (pictures / "model" / "train.json").write_text(json.dumps(settings))
    code, output, errors = run(f"{LINE} --npz samples.npz")
    assert (code, errors) == (0, "")
    first, device, last = output.splitlines()
    assert (first, last) == ("20 images, not measured", "samples.npz")
    assert re.fullmatch(r"drawn on (cpu with \d+ threads?|cuda:\d+)", device)
    with np.load(pictures / "samples.npz") as archive:
        counts = np.bincount(archive["arr_1"], minlength=10)
    assert counts.sum() == 20
    assert trained == "folder" or counts.tolist() == [2] * 10


@pytest.mark.parametrize(
    ("trained", "options", "expected"),
    [
        (None, "--npz x.npz", (None, None, "white")),
        (None, "--dataset folder --data-root x", ("folder", "x", "white")),
        ({"dataset": "folder", "data_root": "y"}, "", ("folder", "y", "white")),
        ({**ON_BLACK, "data_root": "y"}, "", ("folder", "y", "black")),
        (ON_BLACK, "--dataset folder", ("folder", None, "black")),
        (ON_BLACK, "--background red", ("folder", None, "red")),
        (ON_BLACK, "--dataset mnist", ("mnist", None, "white")),
    ],
)  # fmt: skip
def test_images_are_read_as_in_training(folder, monkeypatch, trained, options, expected):
    monkeypatch.chdir(folder)
    if trained is not None:
        (folder / "model" / "train.json").write_text(json.dumps(trained))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(["--checkpoint", "model", *options.split()])
    assert chosen_dataset(arguments) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--dataset: is needed, 'model' holds no train.json"),
        ("--dataset birds", "--dataset: expected one of digits, "),
        ("--dataset folder", "--data-root: the data set 'folder' needs a folder"),
        ("--dataset folder --data-root empty", "empty"),
        ("--dataset mnist", "--dataset: 'mnist' is 32 x 32, got 8"),
        ("--dataset digits --samples 0", "--samples: expected a positive whole number, got '0'"),
        ("--dataset digits --samples 2", "--samples: expected at least 4, got 2"),
        ("--dataset digits --classifier nowhere", "nowhere: no such file"),
        ("--dataset digits --classifier model/config.json", "model/config.json: not a safetensors"),
        ("--dataset digits --inception nowhere", "nowhere: no such file"),
        ("--dataset digits --output model/config.json/x.json", "config.json: is not a folder"),
        ("--dataset digits --output empty", "empty: is a folder"),
        ("--dataset digits --npz x.txt", "--npz: expected a name that ends in .npz, got x.txt"),
        ("--dataset digits --npz /proc/self/x.npz", "output folder /proc/self: not writable"),
        (
            "--dataset digits --skip-broken",
            "--skip-broken: only 'folder' and 'shards' have files to skip",
        ),
        ("--dataset digits --background red", "--background: only 'folder' has transparency"),
        ("--dataset folder --data-root empty --background glass", "--background: expected a colo"),
        ("--npz x.npz --output y.json", "--dataset: is needed, 'model' holds no train.json"),
        (
            "--dataset folder --data-root pictures --npz x.npz --output y.json",
            "--classifier: there",
        ),
        ("--dataset digits --save-classifier x", "--save-classifier: goes with --classifier train"),
        ("--dataset digits --neighbours x.txt", "x.txt"),
        ("--dataset digits --steps 1,2,3", "--steps: expected a list of 2 numbers"),
        ("--dataset digits --device gpu", "--device: cannot use 'gpu' here"),
    ],
)
def test_bad_evaluation_is_one_line(pictures, refused, options, message):
    (pictures / "empty").mkdir()
    assert message in refused(f"{LINE} {options}")

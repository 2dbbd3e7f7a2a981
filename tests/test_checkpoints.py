"""The checkpoints in the repository: complete, theirs the figures beside them, and they draw."""

import json
from pathlib import Path

import pytest
import torch
from scipy.stats import beta, binom

from ecar.data import load_dataset
from ecar.evaluation import Classifier, draw_labels, generate
from ecar.evaluation.provenance import weights_sha256
from ecar.pipeline import ECARPipeline
from ecar.sampling import sample
from ecar.training import TrainConfig
from tools.update_docs import ROOT

CHECKPOINTS = sorted(path.parent for path in ROOT.glob("checkpoints/*/evaluation.json"))


@pytest.fixture(params=CHECKPOINTS, ids=lambda folder: folder.name)
def folder(request) -> Path:
    return request.param


@pytest.fixture
def report(folder) -> dict:
    return json.loads((folder / "evaluation.json").read_text("utf-8"))


def test_there_is_one():
    assert CHECKPOINTS


def test_it_is_complete_and_small(folder):
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "evaluation.json",
        "log.csv",
        "model.safetensors",
        "pipeline.json",
        "train.json",
    }
    assert (folder / "model.safetensors").stat().st_size <= 16 * 2**20


def test_it_was_trained_as_its_train_json_says(folder):
    config = TrainConfig.from_json(folder / "train.json")
    assert config.model == ECARPipeline.from_pretrained(folder).model.config
    last = (folder / "log.csv").read_text().splitlines()[-1]
    assert int(last.split(",")[0]) == config.steps


def test_the_figures_are_those_of_these_weights(folder, report):
    pipeline = ECARPipeline.from_pretrained(folder)
    sampling = report["protocol"]["sampling"]
    assert sampling["weights_sha256"] == weights_sha256(pipeline.model)
    for name in ("num_inference_steps", "guidance_scale", "solver"):
        assert sampling[name] == pipeline.defaults[name]


def test_new_samples_are_read_as_the_report_says(folder, report):
    """Of 200 new seeds: fewer than this would be seen twice in a million runs."""
    pipeline = ECARPipeline.from_pretrained(folder)
    labels = draw_labels(load_dataset(report["protocol"]["dataset"]), 200)  # as the report's
    images = generate(pipeline, labels, torch.randint(2**62, (200,)), progress=False)
    read = Classifier.load(report["protocol"]["dataset"])(images.float() / 127.5 - 1)[1]
    count = report["protocol"]["generated_images"]
    correct = round(report["metrics"]["label_accuracy"] * count)
    lowest_share = beta.ppf(1e-6, correct, count - correct + 1)  # Clopper and Pearson's bound
    assert (read.argmax(1) == labels).sum() >= binom.ppf(1e-6, 200, lowest_share)


def test_32_calls_of_ab2_err_less_than_250_of_euler(folder):
    """Against the converged trajectory of the same ten seeds, one of each class."""
    pipeline = ECARPipeline.from_pretrained(folder)
    model, stages = pipeline.model, pipeline.model.config.num_stages

    def drawn(steps, solver, grid=1.0):
        settings = {"steps": steps, "solver": solver, "grid": grid}
        scale = pipeline.defaults["guidance_scale"]
        seeds = torch.arange(10)
        return sample(model, torch.arange(10), seeds=seeds, guidance_scale=scale, **settings)

    exact = drawn([100] * stages, "heun", 1.5).latents
    few, many = (
        (drawn(*settings).latents - exact).square().mean().sqrt().item()
        for settings in ((32, "ab2", 1.5), (250, "euler"))
    )
    assert few <= many, f"{few:.4f} and {many:.4f} of {exact.square().mean().sqrt():.4f}"

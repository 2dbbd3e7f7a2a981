"""The table of quality by solver and calls, on a checkpoint in the repository."""

import math

import pytest
import torch
from scipy.stats import t as student

from benchmarks import quality
from ecar import ECARPipeline
from ecar.sampling import split_steps


def test_settings_spend_the_calls_that_they_are_given():
    for setting in quality.SETTINGS:
        for calls in quality.CALLS:
            options = setting.options(calls, 3)
            steps = split_steps(options["num_inference_steps"], 3)
            assert sum(steps) == max(calls // setting.calls_of_a_step, 3)
            assert not setting.as_paper or max(steps) - min(steps) <= 1


def test_an_interval_is_students():
    groups = [dict.fromkeys(quality.METRICS, value) for value in (1.0, 2.0, 6.0)]
    mean, half = quality.summary(groups)["recall"]
    assert mean == 3
    assert math.isclose(half, student.ppf(0.975, 2) * math.sqrt(7) / math.sqrt(3))


@pytest.fixture(scope="module")
def judge() -> quality.Judge:
    return quality.Judge("digits", groups=2, images=100)


def test_training_images_have_the_ratio_one_and_are_read_right(judge):
    ratios = [found["Fréchet ratio"] for found in judge.real]
    assert math.isclose(sum(ratios) / 2, 1.0)
    assert min(found["read as asked"] for found in judge.real) > 0.95


def test_guidance_at_every_step_is_the_samplers():
    pipeline = ECARPipeline.from_pretrained(quality.ROOT / "checkpoints" / "digits")
    labels, seeds = torch.arange(10), torch.arange(10)
    options = {"num_inference_steps": [4, 3], "grid": 1.5}
    drawn = pipeline(
        labels, seeds=seeds, solver="ab2", guidance_scale=2.0, output_type="latent", **options
    ).images
    same, reused = (
        quality.draw_reusing(pipeline.model, labels, seeds, options, 2.0, every) for every in (1, 2)
    )
    torch.testing.assert_close(same, drawn, atol=1e-3, rtol=0)
    assert (reused - drawn).abs().max() > 0.01


def test_noise_is_judged_worse_than_images(judge):
    pipeline = ECARPipeline.from_pretrained(quality.ROOT / "checkpoints" / "digits")
    (row,) = quality.measure(pipeline, lambda: judge, quality.SETTINGS[3], calls=8)["rows"]
    counts = split_steps(8, 2)
    assert row["calls"] == 8
    assert row["calls_x_tokens"] == 2 * (4 * counts[0] + 16 * counts[1])
    drawn = {metric: mean for metric, (mean, _) in row["measures"].items()}
    noise = torch.randint(256, (100, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    worse = judge.measure(noise.to(torch.uint8), judge.labels[0])
    assert drawn["read as asked"] > worse["read as asked"]
    assert drawn["Fréchet ratio"] < worse["Fréchet ratio"]
    assert drawn["precision"] > worse["precision"]
    record = {
        "checkpoint": "digits",
        "groups": 2,
        "images": 100,
        "rows": [row, *quality.measure_training(lambda: judge)["rows"]],
    }
    text = " ".join(quality.render(record).split())
    assert f"| ab2 | 8 | {row['calls_x_tokens']} | {100 * drawn['read as asked']:.1f} ± " in text
    assert "| training images | - | - | " in text

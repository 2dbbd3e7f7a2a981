"""Reports: the numbers, the protocol beside them, and errors before any work."""

import json

import numpy as np
import pytest
import torch

from ecar.config import ECARConfig
from ecar.data import InMemoryDataset, load_dataset
from ecar.evaluation import (
    Classifier,
    draw_labels,
    evaluate,
    evaluate_images,
    frechet_distance_of_features,
    generate,
    summary,
)
from ecar.evaluation.extractors import to_bytes
from ecar.files import weights_sha256
from ecar.model import ECAR
from ecar.pipeline import ECARPipeline

SETTINGS = {"num_inference_steps": [2, 1], "guidance_scale": 1.5}


@pytest.fixture(scope="module")
def model():
    config = ECARConfig(
        stage_sides=(4, 8), channels=1, num_classes=10, width=16, heads=2, ar_layers=1,
        flow_blocks=1,
    )  # fmt: skip
    model = ECAR(config)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return model


@pytest.fixture(scope="module")
def digits():
    return [load_dataset("digits", split=split) for split in ("train", "test")]


@pytest.fixture(scope="module")
def classifier():
    return Classifier.load("digits")


def test_labels_are_as_frequent_as_in_the_training_set(digits):
    train, _ = digits
    assert torch.equal(draw_labels(train, len(train)).bincount(), train.labels.bincount())
    twice = draw_labels(train, 2 * len(train))
    assert torch.equal(twice.bincount(), 2 * train.labels.bincount())
    assert not torch.equal(draw_labels(train, 50), draw_labels(train, 50, seed=1))
    assert torch.equal(draw_labels(train, 50), draw_labels(train, 50))


def test_generate_does_not_depend_on_batches(model):
    labels, seeds = torch.randint(0, 10, (7,)), torch.randint(-(2**62), 2**62, (7,))
    together = generate(model, labels, seeds, progress=False, **SETTINGS)
    assert together.dtype == torch.uint8 and together.shape == (7, 1, 8, 8)
    apart = generate(model, labels, seeds, batch_size=3, progress=False, **SETTINGS)
    # Rounding may move a pixel by one level.
    assert (together.int() - apart.int()).abs().max() <= 1
    pictures = ECARPipeline(model)(
        labels.tolist(), seeds=seeds.tolist(), progress=False, **SETTINGS
    ).images
    assert np.abs(np.stack(pictures).astype(int) - together[:, 0].int().numpy()).max() <= 1


def test_generate_leaves_a_model_in_training(model):
    model.train()
    generate(model, torch.tensor([1]), torch.tensor([2]), progress=False, **SETTINGS)
    assert model.training


def test_held_out_images_against_themselves(digits, classifier):
    train, test = digits
    images, labels = test.tensors()
    report = evaluate_images(images, labels, train, test, classifier, progress=False)
    metrics, real = report["metrics"], report["real"]
    assert metrics["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert (metrics["precision"], metrics["recall"]) == (1, 1)
    assert metrics["label_accuracy"] == real["held_out_label_accuracy"] >= 0.98
    assert metrics["frechet_ratio"] < 1e-6 < real["frechet_distance"]
    wrong = evaluate_images(images, (labels + 1) % 10, train, test, classifier, progress=False)
    assert wrong["metrics"]["label_accuracy"] <= 0.02
    assert wrong["protocol"]["extractor"]["sha256"] == classifier.sha256


def test_real_training_images_score_as_the_floor(digits, classifier):
    """As many as there are: generated and real are then the same set, in another order."""
    train, test = digits
    images, labels = train.tensors()
    report = evaluate_images(images, labels, train, test, classifier, progress=False)
    floor = report["real"]["frechet_distance"]
    assert report["metrics"]["frechet_distance"] == pytest.approx(floor, rel=1e-4)
    assert report["metrics"]["frechet_ratio"] == pytest.approx(1, rel=1e-4)
    features, held_out = (classifier(to_bytes(d.tensors()[0]) / 127.5 - 1)[0] for d in digits)
    assert floor == pytest.approx(frechet_distance_of_features(features, held_out), rel=1e-4)


def test_the_ratio_is_of_equal_numbers(digits, classifier):
    """With more samples than training images, the first as many are compared."""
    train, test = digits
    images, labels = (
        torch.cat([a, b]) for a, b in zip(*(d.tensors() for d in digits), strict=True)
    )
    report = evaluate_images(images, labels, train, test, classifier, progress=False)
    assert report["protocol"]["generated_images"] == 1797
    assert report["protocol"]["real_train_images"] == 1437
    assert report["metrics"]["frechet_ratio"] == pytest.approx(1, rel=1e-4)
    assert report["metrics"]["frechet_distance"] < report["real"]["frechet_distance"]


def test_without_logits(digits):
    train, test = digits
    images, _ = test.tensors()
    report = evaluate_images(
        images, None, train, test, lambda x: (x.flatten(1)[:, 10:30], None), progress=False
    )
    assert report["metrics"]["label_accuracy"] is None
    assert report["metrics"]["inception_score"] is None
    assert "-" in summary(report)


def test_evaluate_writes_report_and_samples(model, digits, tmp_path):
    folder = tmp_path / "model"
    ECARPipeline(model, defaults={"num_inference_steps": 3}).save_pretrained(folder)
    report = evaluate(
        folder, "digits", num_images=40, first_seed=100, batch_size=16, guidance_scale=1.5,
        report=tmp_path / "report.json", samples=tmp_path / "samples.npz", progress=False,
    )  # fmt: skip
    assert json.loads((tmp_path / "report.json").read_text()) == report
    sampling = report["protocol"]["sampling"]
    assert sampling["checkpoint"] == "model" and sampling["seeds"] == [100, 139]
    assert (sampling["num_inference_steps"], sampling["guidance_scale"]) == (3, 1.5)
    assert sampling["weights_sha256"] == weights_sha256(model)
    assert sampling["model"] == model.config.to_dict()
    protocol = report["protocol"]
    assert protocol["generated_images"] == protocol["real_train_images"] == 40
    assert protocol["held_out_images"] == 360 and protocol["train_images_available"] == 1437
    for key in ("ecar", "torch", "python", "ecar_commit"):
        assert key in protocol["versions"]
    assert "40" in summary(report) and "digits" in summary(report)

    # The samples are those of the seeds and labels that the report names.
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert np.array_equal(labels, draw_labels(digits[0], 40, seed=100).numpy())
    again = generate(
        model, torch.from_numpy(labels[:5]), torch.arange(100, 105), num_inference_steps=3,
        guidance_scale=1.5, progress=False,
    )  # fmt: skip
    assert np.abs(images[:5, ..., 0].astype(int) - again[:, 0].int().numpy()).max() <= 1


def test_another_dtype_is_measured_next_to_the_sources_own(model, tmp_path, monkeypatch):
    """The same classes and seeds in both; the source is left in the new one."""
    monkeypatch.setattr("ecar.evaluation.report.LATENTS", 3)
    ECARPipeline(model, defaults=SETTINGS).save_pretrained(tmp_path)

    def measured(pipeline, **options):
        return evaluate(pipeline, "digits", num_images=40, first_seed=9, progress=False, **options)

    pipeline = ECARPipeline.from_pretrained(tmp_path)
    own, same = measured(pipeline), measured(pipeline, dtype=torch.float32)
    assert own["metrics"] == same["metrics"] and "before_cast" not in same
    cast = measured(pipeline, dtype=torch.bfloat16, report=tmp_path / "report.json")
    assert pipeline.dtype == torch.bfloat16
    assert json.loads((tmp_path / "report.json").read_text()) == cast
    before = cast["before_cast"]
    assert (before["dtype"], before["metrics"]) == ("torch.float32", own["metrics"])
    assert cast["protocol"]["sampling"]["dtype"] == "torch.bfloat16"
    assert cast["metrics"] == measured(pipeline)["metrics"] != own["metrics"]
    latents = before["latents"]
    assert latents["seeds"] == [9, 11] and latents["images"] == 3
    assert 0 < latents["distance"] < latents["error_before"]
    table = summary(cast).splitlines()
    assert table[0].split() == ["generated", "in", "float32", "real"]
    (line,) = [line for line in table if line.startswith("error of the latents")]
    assert f"{latents['error']:.4f}" in line and f"{latents['distance']:.4f} apart" in line


def test_bad_arguments_are_named_before_sampling(model, tmp_path, monkeypatch):
    monkeypatch.setattr("ecar.evaluation.report.generate", None)
    (tmp_path / "file").touch()
    for changed, error, message in [
        ({"num_images": 3}, ValueError, "argument 'num_images'"),
        ({"num_images": 10.0}, TypeError, "argument 'num_images'"),
        ({"batch_size": 0}, ValueError, "argument 'batch_size'"),
        ({"dataset": "latents"}, ValueError, "argument 'dataset'"),
        ({"dataset": "mnist"}, ValueError, "argument 'image_size': 'mnist' is 32 x 32, got 8"),
        ({"report": tmp_path / "file" / "x.json"}, OSError, "file: is not a folder"),
        ({"report": tmp_path}, OSError, "is a folder"),
        ({"samples": tmp_path / "x.npy"}, ValueError, "argument 'samples'"),
        ({"source": tmp_path / "absent"}, OSError, "absent"),
        ({"source": 5}, TypeError, "argument 'source'"),
    ]:
        arguments = {"source": model, "dataset": "digits", "progress": False, **changed}
        with pytest.raises(error, match=message):
            evaluate(**arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_bad_images_are_named(digits, classifier):
    train, test = digits
    images, labels = test.tensors()
    for bad_images, bad_labels, error, message in [
        (images[:, :, :7], labels, ValueError, "argument 'images'"),
        (images[:3], labels[:3], ValueError, "at least 4 images"),
        (images / 0, labels, ValueError, "NaN"),
        (images.long(), labels, TypeError, "argument 'images'"),
        (images, labels[1:], ValueError, "argument 'labels'"),
        (images, labels.int(), ValueError, "argument 'labels'"),
    ]:
        with pytest.raises(error, match=message):
            evaluate_images(bad_images, bad_labels, train, test, classifier, progress=False)


def test_a_data_set_with_more_classes_than_the_model(model, digits, tmp_path, monkeypatch):
    pixels = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8)
    wide = InMemoryDataset("folder", "train", pixels, torch.arange(12), "abcdefghijkl")
    monkeypatch.setattr("ecar.evaluation.report.load_dataset", lambda *_, **__: wide)
    with pytest.raises(ValueError, match="has 12 classes, the model 10"):
        evaluate(model, "folder", root=tmp_path, extractor=lambda x: (x, None), progress=False)


def toy(count, split, level=None, seed=0):
    """Images of noise, or of one grey level."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    if level is not None:
        pixels.fill_(level)
    return InMemoryDataset("folder", split, pixels, torch.arange(count) % 10, "0123456789")


def five(images):
    return images.flatten(1)[:, :5], None


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"test": toy(3, "test")}, ValueError, "'test': expected at least 4 images, got 3"),
        ({"train": toy(2, "train")}, ValueError, "'train': expected at least 4 images, got 2"),
        ({"extractor": lambda x: (x.flatten(1) * torch.nan, None)}, ValueError, "features hold Na"),
        ({"extractor": lambda x: (five(x)[0], x.flatten(1) / 0)}, ValueError, "logits hold NaN"),
        ({"extractor": lambda x: (five(x)[0], x[:1].flatten(1))}, ValueError, "expected logits"),
        ({"extractor": lambda x: (x, None)}, ValueError, r"expected features \[\d+, F\]"),
        ({"extractor": lambda x: x.flatten(1)}, TypeError, "features, logits or None.*Tensor"),
        ({"num_inference_steps": [1, 2, 3]}, ValueError, "'num_inference_steps'"),
        ({"guidance": 2.0}, TypeError, "'guidance': expected settings out of"),
        ({"solver": "rk4"}, ValueError, "'solver'"),
    ],
)
def test_all_that_can_be_wrong_is_found_before_sampling(
    model, changed, error, message, monkeypatch
):
    def generate(*_, **__):
        raise AssertionError("sampled")

    splits = {"train": toy(40, "train"), "test": toy(30, "test", seed=1)}
    splits |= {name: changed.pop(name) for name in ("train", "test") if name in changed}

    def opened(name, *, split, **_):
        return splits[split]

    monkeypatch.setattr("ecar.evaluation.report.generate", generate)
    monkeypatch.setattr("ecar.evaluation.report.load_dataset", opened)
    arguments = {"extractor": five, "num_images": 8, "progress": False, **changed}
    with pytest.raises(error, match=message) as caught:
        evaluate(model, "folder", **arguments)
    assert "\n" not in str(caught.value) and "_features" not in str(caught.value)
    splits.update(train=toy(40, "train"), test=toy(30, "test", seed=1))
    with pytest.raises(AssertionError, match="sampled"):
        evaluate(model, "folder", extractor=five, num_images=8, progress=False)


@pytest.mark.parametrize("extractor", ["five", "classifier"])
@pytest.mark.parametrize(
    ("train", "test"),
    [
        (toy(20, "train"), toy(20, "test")),
        (toy(20, "train", level=7), toy(20, "test", level=7)),
        (toy(20, "train", level=7), toy(4, "test", level=7)),
        (toy(4, "train"), toy(4, "test")),
    ],
    ids=["equal sets", "one picture", "one picture, few", "equal, few"],
)
def test_a_floor_of_zero_gives_no_ratio(train, test, extractor, classifier):
    """Nor does rounding, where the sets are the same in another order."""
    measure = five if extractor == "five" else classifier
    images = torch.rand(20, 1, 8, 8) * 2 - 1
    for seed in range(3):
        report = evaluate_images(images, None, train, test, measure, seed=seed, progress=False)
        assert report["metrics"]["frechet_ratio"] is None
        json.dumps(report, allow_nan=False)
        (line,) = [x for x in summary(report).splitlines() if x.startswith("ratio of Fréchet")]
        assert line.split()[-1] == "-"


def test_few_images_for_the_features_are_told(capsys):
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    train, test = toy(40, "train"), toy(30, "test", seed=1)
    report = evaluate_images(images, None, train, test, five)
    assert report["protocol"]["singular_covariances"] == ["generated", "training"]
    assert "5 features of 5 generated, 5 training images" in capsys.readouterr().err
    assert "too few images for the number of features: generated, training" in summary(report)
    report = evaluate_images(torch.cat([images] * 2), None, train, test, five, progress=False)
    assert report["protocol"]["singular_covariances"] == []
    assert "too few" not in summary(report) and capsys.readouterr().err == ""


def test_logits_of_other_classes_are_no_accuracy():
    """As Inception's, which know 1,008 classes of their own."""

    def other(images):
        return five(images)[0], images.flatten(1)[:, :12]

    train, test = toy(40, "train"), toy(30, "test", seed=1)
    images, labels = torch.rand(20, 1, 8, 8) * 2 - 1, torch.arange(20) % 10
    report = evaluate_images(images, labels, train, test, other, progress=False)
    assert report["metrics"]["label_accuracy"] is None
    assert report["metrics"]["inception_score"] > 0

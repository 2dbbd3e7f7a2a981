"""The classifiers in the repository read what they should, and their files are checked."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ecar.data import InMemoryDataset, load_dataset
from ecar.evaluation import Classifier
from ecar.evaluation.classifier import (
    PRESETS,
    ClassifierConfig,
    accuracy,
    augment,
    background,
    default_config,
    find_classifier,
    main,
    train_classifier,
)

SMALL = ClassifierConfig(image_size=8, stem_kernel=3, stem_stride=1, widths=(8, 16), features=12)


@pytest.mark.parametrize(("name", "least"), [("mnist", 0.99), ("digits", 0.98), ("emoji", 0.7)])
def test_committed_classifiers_read_the_held_out_images(name, least):
    model = Classifier.load(name)
    test = load_dataset(name, split="test")
    share = accuracy(model, test)
    assert share >= least
    assert float(model.metadata["held_out_accuracy"]) == pytest.approx(share, abs=1.5 / len(test))
    assert int(model.metadata["held_out_images"]) == len(test)
    assert model.metadata["dataset"] == name
    assert find_classifier(name).stat().st_size < 2 << 20


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_shapes_and_independence_of_the_batch(name):
    model = Classifier.load(name)
    config = model.config
    images = torch.rand(7, config.channels, config.image_size, config.image_size) * 2 - 1
    features, logits = model(images)
    assert features.shape == (7, config.features) and logits.shape == (7, config.num_classes)
    assert not features.requires_grad and not model.training
    alone, _ = model(images[3:4])
    assert torch.allclose(alone, features[3:4], rtol=1e-5, atol=1e-5)


def test_training_is_reproducible_and_learns(tmp_path):
    """Bright against dark images: learnt in a few steps, to the same bits twice."""
    labels = torch.arange(256) % 2
    pixels = torch.randint(0, 100, (256, 1, 8, 8), dtype=torch.uint8) + (labels * 120).view(
        -1, 1, 1, 1
    ).to(torch.uint8)
    data = InMemoryDataset("toy", "train", pixels, labels, "ab")
    before = torch.random.get_rng_state()
    first, second, other = (
        train_classifier(data, SMALL, epochs=4, batch_size=32, seed=seed, progress=False)
        for seed in (5, 5, 6)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert accuracy(first, data) == 1
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.head.weight, other.head.weight)

    path = tmp_path / "toy.safetensors"
    first.save(path, dataset="toy", held_out_accuracy=1.0)
    loaded = Classifier.load(path)
    images, _ = data.tensors()
    assert all(torch.equal(a, b) for a, b in zip(first(images), loaded(images), strict=True))
    assert loaded.metadata["dataset"] == "toy" and len(loaded.sha256) == 64


def test_augmentation_stays_in_range_and_moves_little():
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    images = torch.full((64, 1, 32, 32), -1.0)
    images[:, :, 12:20, 12:20] = 1
    rough = augment(images, generator)
    assert rough.shape == images.shape and rough.min() >= -1 and rough.max() <= 1
    assert rough.unique().numel() > 10_000
    moved = augment(images, generator, noise=0)
    assert moved.shape == images.shape and moved.min() >= -1 and moved.max() <= 1
    assert not torch.equal(moved[0], moved[1])
    # Shifts of at most 2 pixels, turns, scales and shears of an 8-pixel square: within 4 pixels.
    border = moved.clone()
    border[:, :, 6:26, 6:26] = -1
    assert (border == -1).all()


def test_what_lies_outside_is_the_data_sets_background():
    images = torch.full((8, 3, 16, 16), 0.25)
    images[:, 0] = 1
    images[:, :, 4:12, 4:12] = -1
    images[0, :, 0] = 0  # one picture with another border
    outside = background(images)
    assert outside.flatten().tolist() == [1, 0.25, 0.25]
    moved = augment(images[1:], torch.Generator().manual_seed(1), noise=0, outside=outside)
    # No third colour comes in from outside, which black would have been.
    assert torch.allclose(moved[:, :, 0, 0], torch.tensor([1, 0.25, 0.25]), atol=1e-5)


@pytest.mark.parametrize(("side", "channels"), [(8, 3), (20, 1), (64, 3), (150, 3)])
def test_any_data_set_of_images_has_a_classifier(side, channels):
    labels = torch.arange(12) % 3
    pixels = torch.randint(0, 256, (12, channels, side, side), dtype=torch.uint8)
    pixels[labels == 1] //= 8
    data = InMemoryDataset("folder", "train", pixels, labels, "abc")
    model = train_classifier(data, epochs=1, batch_size=6, progress=False)
    assert model.config == default_config(data) and model.config.image_size == side
    features, logits = model(data.tensors()[0])
    assert features.shape == (12, 64) and logits.shape == (12, 3)
    assert model.metadata["train_images"] == "12" and model.metadata["epochs"] == "1"


def test_latents_have_none():
    data = InMemoryDataset(
        "latents", "train", torch.zeros(4, 4, 8, 8, dtype=torch.uint8), torch.zeros(4), "a"
    )
    with pytest.raises(ValueError, match=r"square images of 1 or 3 channels .*\[4, 8, 8\]"):
        train_classifier(data, progress=False)


def test_files_that_are_no_classifier(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):
        Classifier.load(path)
    Classifier(SMALL).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"x\.safetensors: not a safetensors file"):
        Classifier.load(path)
    tensors = {name: t.contiguous() for name, t in Classifier(SMALL).state_dict().items()}
    wrong = json.dumps({"image_size": 8, "widths": [8, 24]})
    for metadata in ({}, {"config": "{"}, {"config": '{"depth": 3}'}, {"config": wrong}):
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=r"x\.safetensors: not the weights") as caught:
            Classifier.load(path)
        assert "\n" not in str(caught.value)
    model = Classifier(SMALL)
    model.head.weight.data[0, 0] = torch.nan
    model.save(path)
    with pytest.raises(ValueError, match=r"head\.weight"):
        Classifier.load(path)


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    out = tmp_path / "new" / "digits.safetensors"
    main(["--dataset", "digits", "--out", str(out), "--epochs", "1"])
    assert "of 360 held-out images" in capsys.readouterr().out
    assert Classifier.load(out).metadata["epochs"] == "1"

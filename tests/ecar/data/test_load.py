"""The data sets that come with the project, and the arguments of load_dataset."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import ecar.data.load as load
from ecar.data import load_dataset

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("name", "split", "count", "shape"),
    [
        ("digits", "train", 1437, (1, 8, 8)),
        ("digits", "test", 360, (1, 8, 8)),
        ("mnist", "test", 10000, (1, 32, 32)),
    ],
)
def test_what_comes_with_the_project(name, split, count, shape):
    dataset = load_dataset(name, split=split)
    assert (len(dataset), dataset.shape, dataset.num_classes) == (count, shape, 10)
    assert dataset.class_names == tuple("0123456789")
    images, labels = dataset.tensors()
    assert images.shape == (count, *shape) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() == 1
    assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(10))
    for index in torch.randint(-count, count, (20,)).tolist():
        image, label = dataset[index]
        assert torch.equal(image, images[index]) and label == labels[index]
        assert isinstance(label, int)
    with pytest.raises(IndexError):
        dataset[count]


def test_mnist_is_mnist():
    with np.load(REPOSITORY / "data" / "mnist.npz", allow_pickle=False) as archive:
        assert archive["train_images"].shape == (60000, 28, 28)
        # The mean and deviation that every MNIST tutorial normalises with.
        assert round(archive["train_images"].mean() / 255, 4) == 0.1307
        assert round(archive["train_images"].std() / 255, 4) == 0.3081
        raw, labels = archive["test_images"], archive["test_labels"]
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    images, loaded = load_dataset("mnist", split="test").tensors()
    assert loaded.tolist() == labels.tolist()
    inner = ((images[:, 0, 2:30, 2:30] + 1) * 127.5).round().to(torch.uint8)
    assert np.array_equal(inner.numpy(), raw)
    border = images.clone()
    border[:, :, 2:30, 2:30] = -1
    assert (border == -1).all()


def test_digits_splits_are_disjoint_and_complete():
    from sklearn.datasets import load_digits

    train, _ = load_dataset("digits", split="train").tensors()
    test, labels = load_dataset("digits", split="test").tensors()
    assert labels.bincount().tolist() == [36] * 10
    ours = sorted(tuple(row) for row in torch.cat([train, test]).flatten(1).tolist())
    theirs = sorted(tuple(row) for row in (load_digits().data / 8 - 1).tolist())
    assert ours == theirs


def test_emoji_are_whole_and_their_splits_share_no_emoji():
    train, test = (load_dataset("emoji", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (2568, 303)
    assert train.shape == test.shape == (3, 32, 32)
    assert train.class_names == test.class_names and train.num_classes == 28
    for dataset in (train, test):
        images, labels = dataset.tensors()
        assert images.min() == -1 and images.max() == 1
        assert set(labels.tolist()) == set(range(28))
        # They lie on white: most corners are.
        assert (images[:, :, 0, 0] == 1).all(dim=1).double().mean() > 0.8
    with np.load(REPOSITORY / "data" / "emoji.npz", allow_pickle=False) as archive:
        codes = {split: archive[f"{split}_codes"].tolist() for split in ("train", "test")}
        assert all(len(codes[split]) == len(archive[f"{split}_names"]) for split in codes)

    def bare(code):
        """Without skin tone, with one gender for all."""
        points = [p for p in code.split("-") if p not in ("1f3fb", "1f3fd", "1f3ff", "fe0f")]
        return ["1f9d1" if p in ("1f468", "1f469") else p for p in points]

    kinds = {split: {"-".join(bare(code)) for code in codes[split]} for split in codes}
    assert not kinds["train"] & kinds["test"]
    pictures = [{image.numpy().tobytes() for image in d.tensors()[0]} for d in (train, test)]
    assert not pictures[0] & pictures[1]


def test_mnist_is_found(tmp_path, monkeypatch):
    source = REPOSITORY / "data" / "mnist.npz"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = shutil.copy(source, elsewhere)
    assert load.find_npz("mnist") == source
    assert load.find_npz("mnist", copy) == Path(copy)
    assert load.find_npz("mnist", elsewhere) == Path(copy)
    monkeypatch.setenv("ECAR_DATA", str(elsewhere))
    assert load.find_npz("mnist") == Path(copy)
    with pytest.raises(FileNotFoundError, match="ECAR_DATA") as caught:
        load_dataset("mnist", root=tmp_path)
    assert str(tmp_path / "mnist.npz") in str(caught.value)


def test_damaged_mnist_is_refused(tmp_path):
    path = tmp_path / "mnist.npz"
    whole = (REPOSITORY / "data" / "mnist.npz").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"mnist\.npz"):
        load_dataset("mnist", root=path)
    np.savez(path, test_images=np.zeros((3, 28, 28), np.uint8), test_labels=np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="expected uint8 images"):
        load_dataset("mnist", root=path, split="test")
    with pytest.raises(ValueError, match="not the project's"):
        load_dataset("mnist", root=path, split="train")
    # An array of objects would need pickle.
    np.savez(path, test_images=np.array([{}]), test_labels=np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="not the project's"):
        load_dataset("mnist", root=path, split="test")


def test_emoji_outside_the_checkout(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"emoji\.npz not found .*ECAR_DATA"):
        load_dataset("emoji", root=tmp_path)
    path = Path(shutil.copy(REPOSITORY / "data" / "emoji.npz", tmp_path))
    monkeypatch.setenv("ECAR_DATA", str(tmp_path))
    assert load.find_npz("emoji") == path
    assert len(load_dataset("emoji", root=path, split="test")) == 303
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **{**arrays, "class_names": arrays["class_names"][:3]})
    with pytest.raises(ValueError, match=r"emoji\.npz: .*expected labels from 0 to 2"):
        load_dataset("emoji")
    np.savez(path, **{name: arrays[name] for name in ("train_images", "train_labels")})
    with pytest.raises(ValueError, match=r"emoji\.npz: not the project's emoji\.npz"):
        load_dataset("emoji")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "cifar"},
            "'name': expected one of digits, mnist, emoji, folder, shards, latents",
        ),
        ({"name": "digits", "split": "valid"}, "argument 'split'"),
        ({"name": "digits", "image_size": 32}, "argument 'image_size': 'digits' is 8 x 8, got 32"),
        ({"name": "digits", "channels": 3}, "argument 'channels': 'digits' has 1, got 3"),
        ({"name": "digits", "flip": True}, "argument 'flip'"),
        ({"name": "folder", "image_size": 8}, "argument 'root'"),
        ({"name": "latents"}, "argument 'root'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(**arguments)

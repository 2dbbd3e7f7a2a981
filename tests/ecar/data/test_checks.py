"""Labels and values of data sets of every kind are looked at where a data set is opened."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, TensorDataset

from ecar.config import ECARConfig
from ecar.data import ImageDataset, InMemoryDataset, cache_latents, load_dataset
from ecar.data.base import load_batches
from ecar.data.load import find_npz
from ecar.evaluation import evaluate_images
from ecar.images import BadImageError
from ecar.training import TrainConfig, Trainer

CLASSES, COUNT, SHAPE = 4, 200, (1, 8, 8)


def good_labels():
    return torch.randperm(COUNT) % CLASSES


def good_images():
    return torch.rand(COUNT, *SHAPE) * 2 - 1


def at(values, row, value):
    values = values.clone()
    values[row] = value
    return values


# What every data set of CLASSES classes refuses.
BAD_LABELS = {
    "one past the end": lambda: at(good_labels(), 0, CLASSES),
    "1 .. N": lambda: good_labels() + 1,
    "negative": lambda: at(good_labels(), -1, -1),
    "far out": lambda: good_labels() * 100,
    "floats": lambda: good_labels() + 0.5,
    "booleans": lambda: good_labels() > 1,
    "NaN": lambda: good_labels() * torch.nan,
    "of two dimensions": lambda: good_labels()[:, None],
}
BAD_IMAGES = {
    "0 .. 255": lambda: good_images() * 127.5 + 127.5,
    "0 .. 1": lambda: at(torch.rand(COUNT, *SHAPE), 0, 0.0),
    "standardized": lambda: good_images() * 2.64,
    "NaN": lambda: at(good_images(), 0, torch.nan),
    "infinite": lambda: at(good_images(), 0, torch.inf),
    "bytes": lambda: (good_images() * 100 + 100).to(torch.uint8),
    "another shape": lambda: good_images()[:, :, 1:],
}


class Items(Dataset):
    """Somebody's own data set."""

    def __init__(self, images, labels):
        self.images, self.given = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.given[index]


class Own(Items, ImageDataset):
    """Somebody's own ImageDataset."""

    def __init__(self, images, labels):
        ImageDataset.__init__(self, "own", "train", SHAPE, "abcd")
        Items.__init__(self, images, labels)

    labels = property(lambda self: self.given)


@pytest.fixture
def open_by(tmp_path):
    """Open images [COUNT, *SHAPE] and labels in every way there is; only pixels have a range."""
    model = ECARConfig(stage_sides=(4, 8), channels=1, num_classes=CLASSES, width=32, heads=2,
                       ar_layers=1, flow_blocks=1)  # fmt: skip
    config = TrainConfig(model=model, output_dir=str(tmp_path / "run"), device="cpu",
                         sample_every=0, num_workers=0)  # fmt: skip

    def train(kind):
        def open(images, labels):
            Trainer(config, dataset=kind(images, labels), progress=False)
            assert not (tmp_path / "run").exists()

        return open

    def encode(images, labels):
        cache_latents(Own(images, labels), None, tmp_path / "new", progress=False)

    def held_out(images, labels):
        pixels = torch.zeros(8, *SHAPE, dtype=torch.uint8)
        whole = InMemoryDataset("x", "train", pixels, torch.arange(8) % CLASSES, "abcd")
        evaluate_images(pixels, None, whole, Own(images, labels), None, progress=False)

    def generated(images, labels):
        pixels = torch.zeros(8, *SHAPE, dtype=torch.uint8)
        whole = InMemoryDataset("x", "train", pixels, torch.arange(8) % CLASSES, "abcd")
        evaluate_images(images, labels, whole, whole, None, progress=False)

    def memory(images, labels):
        InMemoryDataset("x", "train", images, labels, "abcd")

    def latents(images, labels):
        codec = type("Codec", (), {"encode": lambda self, images: images})()
        folder = tmp_path / "latents"
        cache_latents(Own(good_images(), good_labels()), codec, folder, progress=False)
        (shard,) = folder.glob("*.safetensors")
        save_file({"latents": images, "labels": labels}, shard)
        load_dataset("latents", root=folder)

    return {
        "tensors": train(TensorDataset), "a data set": train(Items), "an ImageDataset": train(Own),
        "cache_latents": encode, "held-out": held_out, "generated": generated,
        "in memory": memory, "latents": latents,
    }  # fmt: skip


WAYS = ["tensors", "a data set", "an ImageDataset", "cache_latents", "held-out", "generated",
        "in memory", "latents"]  # fmt: skip


@pytest.mark.parametrize("kind", BAD_LABELS)
@pytest.mark.parametrize("way", WAYS)
def test_labels(open_by, way, kind):
    images = good_images()
    if way == "in memory":
        images = (images * 100 + 100).to(torch.uint8)
    with pytest.raises((TypeError, ValueError), match="label") as caught:
        open_by[way](images, BAD_LABELS[kind]())
    assert "\n" not in str(caught.value)
    if kind in ("one past the end", "negative"):
        assert str(CLASSES - 1) in str(caught.value)  # the last class that there is
        assert str(CLASSES if "past" in kind else -1) in str(caught.value)


@pytest.mark.parametrize("kind", BAD_IMAGES)
@pytest.mark.parametrize("way", WAYS)
def test_values(open_by, way, kind):
    images = BAD_IMAGES[kind]()
    legal = {
        "in memory": ("bytes", "another shape"), "generated": ("bytes",),
        "latents": ("0 .. 255", "0 .. 1", "standardized"),  # a codec's may be of any range
    }  # fmt: skip
    if kind in legal.get(way, ()):
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        open_by[way](images, good_labels())
    assert "\n" not in str(caught.value)
    if kind in ("0 .. 255", "0 .. 1"):
        came = f"from 0 to {255 if '255' in kind else 1}"
        low, _, high = str(caught.value).partition(" from ")[2].partition(" to ")
        assert float(low) == pytest.approx(0, abs=2), came
        assert float(high.split(";")[0].split()[0]) == pytest.approx(float(came[9:]), rel=0.02)


@pytest.mark.parametrize("way", ["tensors", "a data set", "an ImageDataset", "cache_latents"])
def test_images_that_may_be_in_0_to_1(open_by, way):
    """Without a black pixel they may as well be bright, so they are taken, with a warning."""
    with pytest.warns(UserWarning, match=r"no value of the images is below 0 .* give 2 x - 1"):
        try:
            open_by[way](torch.rand(COUNT, *SHAPE) / 2 + 0.25, good_labels())
        except (TypeError, AttributeError) as error:
            assert way == "cache_latents" and "NoneType" in str(error)  # no codec was given


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("way", ["tensors", "a data set", "an ImageDataset", "held-out"])
def test_what_is_right_is_taken(open_by, way, dtype):
    """Labels of any integer type, strided; what a codec overshoots."""
    labels = torch.stack([good_labels()] * 2, 1)[:, 0].to(dtype)
    try:
        open_by[way](good_images() * 1.005, labels)
    except TypeError as error:
        assert way == "held-out" and "NoneType" in str(error)  # no extractor was given


@pytest.mark.parametrize(("label", "error"), [(CLASSES, ValueError), (-1, ValueError),
                                              (1.0, TypeError)])  # fmt: skip
def test_a_label_that_was_not_looked_at(tmp_path, label, error):
    """64 items of a data set that computes them are looked at; the others in their batches."""
    labels = good_labels().tolist()
    labels[1] = label
    model = ECARConfig(stage_sides=(4, 8), channels=1, num_classes=CLASSES, width=32, heads=2,
                       ar_layers=1, flow_blocks=1)  # fmt: skip
    config = TrainConfig(model=model, output_dir=str(tmp_path / "run"), device="cpu", steps=1,
                         sample_every=0, num_workers=0, batch_size=COUNT)  # fmt: skip
    trainer = Trainer(config, dataset=Items(good_images(), labels), progress=False)
    with pytest.raises(error, match=r"argument 'dataset': expected .*labels"):
        trainer.run()


def test_classes_without_an_image_are_told(tmp_path):
    model = ECARConfig.preset("digits", num_classes=CLASSES)
    config = TrainConfig(model=model, output_dir=str(tmp_path / "run"), device="cpu")
    labels = good_labels().clamp(max=CLASSES - 2)
    with pytest.warns(UserWarning, match=f"1 of {CLASSES} classes .* such as class {CLASSES - 1}"):
        Trainer(config, dataset=TensorDataset(good_images(), labels), progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels + 1, "expected labels from 0 to 9, got 10"),
        (lambda labels: labels.astype(np.int64) - 1, "expected labels from 0 to 9, got -1"),
        (lambda labels: labels.astype(np.float32), "expected integer labels, got torch.float32"),
        (lambda labels: labels[:, None], "10000 images|labels|\\[10000, 1\\]"),
    ],
)
def test_labels_of_mnist(tmp_path, change, message):
    with np.load(find_npz("mnist"), allow_pickle=False) as archive:
        images, labels = archive["test_images"], archive["test_labels"]
    np.savez(tmp_path / "mnist.npz", test_images=images, test_labels=change(labels))
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset("mnist", root=tmp_path, split="test")
    assert str(tmp_path / "mnist.npz") in str(caught.value)


def test_pixels_beyond_their_maximum():
    pixels = torch.full((4, *SHAPE), 17, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"'pixels': expected .* 0 to 16, got .* 17 to 17"):
        InMemoryDataset("x", "train", pixels, torch.arange(4), "abcd", maximum=16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_latents_of_a_quantized_type(tmp_path, dtype):
    """Also where the index says so."""
    codec = type("Codec", (), {"encode": lambda self, images: images})()
    cache_latents(Own(good_images(), good_labels()), codec, tmp_path, progress=False)
    (shard,) = tmp_path.glob("*.safetensors")
    tensors = load_file(shard)
    save_file({**tensors, "latents": tensors["latents"].to(dtype)}, shard)
    with pytest.raises(ValueError, match="expected latents F32"):
        load_dataset("latents", root=tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    code = {torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32"}.get(dtype, "F8_E4M3")
    (tmp_path / "index.json").write_text(json.dumps({**index, "dtype": code}))
    with pytest.raises(ValueError, match=f"expected latents F32, BF16, F16, got '{code}'"):
        load_dataset("latents", root=tmp_path)


class Unreadable(Dataset):
    """Its file can't be read, which it says as `error`."""

    def __init__(self, error):
        self.error = error

    def __getitem__(self, row):
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "error",
    [
        BadImageError([("a.png", "cut short")]),
        BadImageError([("a.png", "x"), ("b.png", "y")], folder=".", total=3, hint="look"),
        FileNotFoundError(2, "No such file or directory", "a.tar"),
        OSError("a.tar: no more"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_can_t_be_read_is_said_as_it_was_raised(error, workers):
    with pytest.raises(type(error)) as caught:
        list(load_batches(Unreadable(error), [[0, 1]], workers=workers))
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


class AtOnce(TensorDataset):
    """A data set that makes a batch at once."""

    def __getitems__(self, rows):
        return [(self.tensors[0][row] + 1, self.tensors[1][row]) for row in rows]


def test_batches_are_those_of_a_data_loader():
    images, labels = good_images(), good_labels()
    for kind, more in ((TensorDataset, 0), (AtOnce, 1)):
        for workers in (0, 1):
            (batch,) = load_batches(kind(images, labels), [[5, 3]], workers=workers)
            assert batch[0].equal(images[[5, 3]] + more) and batch[1].equal(labels[[5, 3]])

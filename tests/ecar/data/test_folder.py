"""Image folders: layout, cropping, mirroring, and files that are not images."""

import numpy as np
import pytest
import torch
from PIL import Image

from ecar.data import load_dataset
from ecar.data.folder import center_crop


@pytest.fixture
def random():
    return np.random.default_rng()


def picture(random, width, height, mode="RGB"):
    depth = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(random.integers(0, 256, (height, width, *depth), dtype=np.uint8), mode)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_layout(tmp_path, random):
    for name, files in {"zebra": ["b.PNG", "a.jpg"], "cat": ["x.webp", "y.bmp", "z.jpeg"]}.items():
        for file in files:
            save(tmp_path / name / file, picture(random, 20, 16))
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    dataset = load_dataset("folder", root=tmp_path, image_size=8)
    assert dataset.class_names == ("cat", "zebra") and dataset.shape == (3, 8, 8)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1]
    images, labels = dataset.tensors()
    assert images.shape == (5, 3, 8, 8) and labels.tolist() == [0, 0, 0, 1, 1]
    assert images.min() >= -1 and images.max() <= 1
    # PNG is lossless: a.jpg comes first, then b.PNG.
    expected = np.array(center_crop(Image.open(tmp_path / "zebra" / "b.PNG"), 8))
    assert torch.equal(images[4], torch.from_numpy(expected).permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.parametrize(("width", "height"), [(8, 8), (9, 31), (64, 33), (5, 7), (100, 17)])
def test_center_crop(random, width, height):
    image = picture(random, width, height)
    assert center_crop(image, 8).size == (8, 8)
    # An image symmetric about both axes stays so: nothing is cut off centre when it comes out even.
    array = np.asarray(picture(random, 8, 12))
    array = np.concatenate([array, array[:, ::-1]], 1)
    array = np.concatenate([array, array[::-1]], 0)
    cropped = np.asarray(center_crop(Image.fromarray(array), 16))
    assert np.array_equal(cropped, array[4:20])


def test_channels(tmp_path, random):
    save(tmp_path / "a" / "1.png", picture(random, 8, 8, "L"))
    save(tmp_path / "a" / "2.png", picture(random, 8, 8, "RGBA"))
    save(tmp_path / "a" / "3.png", picture(random, 8, 8).quantize(16))
    gray = load_dataset("folder", root=tmp_path, image_size=8, channels=1)
    color = load_dataset("folder", root=tmp_path, image_size=8, channels=3)
    assert gray.tensors()[0].shape == (3, 1, 8, 8)
    assert torch.equal(color[0][0], gray[0][0].expand(3, 8, 8))
    with pytest.raises(ValueError, match="argument 'channels'"):
        load_dataset("folder", root=tmp_path, image_size=8, channels=4)


def test_flip_doubles_the_set(tmp_path, random):
    for i in range(3):
        save(tmp_path / f"class{i}" / "0.png", picture(random, 8, 8))
    plain, labels = load_dataset("folder", root=tmp_path, image_size=8).tensors()
    both, both_labels = load_dataset("folder", root=tmp_path, image_size=8, flip=True).tensors()
    assert torch.equal(both, torch.cat([plain, plain.flip(-1)]))
    assert both_labels.tolist() == labels.tolist() * 2


def test_split_layout_keeps_the_labels(tmp_path, random):
    for path in ("train/a", "train/b", "train/c", "val/c"):
        save(tmp_path / path / "0.png", picture(random, 8, 8))
    train = load_dataset("folder", root=tmp_path, image_size=8)
    test = load_dataset("folder", root=tmp_path, split="test", image_size=8)
    assert train.class_names == test.class_names == ("a", "b", "c")
    assert test.labels.tolist() == [2]
    save(tmp_path / "val" / "d" / "0.png", picture(random, 8, 8))
    with pytest.raises(ValueError, match="no such class"):
        load_dataset("folder", root=tmp_path, split="test", image_size=8)


def test_no_held_out_split(tmp_path, random):
    save(tmp_path / "a" / "0.png", picture(random, 8, 8))
    with pytest.raises(FileNotFoundError, match="'test' or 'val'"):
        load_dataset("folder", root=tmp_path, split="test", image_size=8)


def test_missing_and_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        load_dataset("folder", root=tmp_path / "absent", image_size=8)
    with pytest.raises(FileNotFoundError, match="no class folders"):
        load_dataset("folder", root=tmp_path, image_size=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no images"):
        load_dataset("folder", root=tmp_path, image_size=8)


@pytest.mark.parametrize("kind", ["empty", "text", "truncated png", "truncated jpeg"])
def test_unreadable_image_is_named(tmp_path, random, kind):
    save(tmp_path / "a" / "good.png", picture(random, 40, 40))
    bad = tmp_path / "a" / ("bad.jpg" if "jpeg" in kind else "bad.png")
    if "truncated" in kind:
        picture(random, 40, 40).save(bad)
        data = bad.read_bytes()
        bad.write_bytes(data[: len(data) // 2])
    else:
        bad.write_bytes(b"" if kind == "empty" else b"hello")
    with pytest.raises(OSError, match=rf"{bad.name}: not a readable image") as caught:
        load_dataset("folder", root=tmp_path, image_size=8)
    assert "\n" not in str(caught.value)
    unchecked = load_dataset("folder", root=tmp_path, image_size=8, verify=False)
    with pytest.raises(OSError, match=bad.name):
        unchecked[0]


def test_image_size_is_required(tmp_path):
    with pytest.raises(TypeError, match="argument 'image_size'"):
        load_dataset("folder", root=tmp_path)
    with pytest.raises(ValueError, match="argument 'image_size'"):
        load_dataset("folder", root=tmp_path, image_size=0)

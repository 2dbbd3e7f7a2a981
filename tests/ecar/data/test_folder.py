"""Image folders: layout, cropping, mirroring, and files that are not images."""

import io
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ecar.data import load_dataset
from ecar.data.folder import center_crop
from ecar.images import BadImageError


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


@pytest.mark.parametrize(("channels", "flip"), [(3, False), (1, True)])
def test_decoded_images_are_the_same_and_no_file_is_read_again(tmp_path, random, channels, flip):
    for name in "ab":
        for index in range(3):
            save(tmp_path / name / f"{index}.png", picture(random, 20, 16))
    dataset = load_dataset("folder", root=tmp_path, image_size=8, channels=channels, flip=flip)
    before = dataset.tensors()
    decoded = dataset.decoded()
    shutil.rmtree(tmp_path / "a")
    assert (decoded.name, decoded.class_names) == ("folder", ("a", "b"))
    assert all(torch.equal(x, y) for x, y in zip(decoded.tensors(), before, strict=True))
    rows = torch.tensor([4, 0, 4])
    images, labels = decoded.take(rows)
    assert torch.equal(images, before[0][rows]) and torch.equal(labels, before[1][rows])


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


def write(path, content=None):
    """A picture, or bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        Image.new("RGB", (8, 8), (10, 200, 30)).save(path)
    else:
        path.write_bytes(content)


def truncated(suffix, keep=0.6):
    """Bytes of a picture that was cut short."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng().integers(0, 256, (64, 64, 3), np.uint8)).save(
        file, Image.registered_extensions()[suffix]
    )
    data = file.getvalue()
    return data[: int(len(data) * keep)]


# What lies there; the class names; how many images of each.
LAYOUTS = {
    "classes": (["a/1.png", "b/2.png"], "ab", [1, 1]),
    "nested": (["a/x/1.png", "a/y/z/2.png", "a/3.png", "b/u/4.png"], "ab", [3, 1]),
    "train only": (["train/a/1.png", "train/b/1.png"], "ab", [1, 1]),
    "both splits": (["train/a/1.png", "train/b/1.png", "test/a/9.png"], "ab", [1, 1]),
    "held-out images beside classes": (["a/1.png", "b/1.png", "test/a/9.png"], "ab", [1, 1]),
    "a class called test": (["a/1.png", "test/1.png"], ["a", "test"], [1, 1]),
    "flat": (["1.png", "2.png"], ["root"], [2]),
    "flat splits": (["train/1.png", "train/2.png", "test/3.png"], ["root"], [2]),
    "litter": (
        ["a/1.png", "b/1.png", ".git/x/1.png", "__MACOSX/a/._1.png", "__MACOSX/1.png",
         "a/._1.png", "a/.hidden.png", "b/__MACOSX/2.png", "a/.thumbs/1.png", "@eaDir/1.png",
         "$RECYCLE.BIN/1.png"],
        "ab", [1, 1],
    ),
    "other suffixes": (["a/1.png", "a/notes.txt", "a/Thumbs.db", "a/.DS_Store", "b/1.PNG",
                        ".DS_Store", "labels.csv"], "ab", [1, 1]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("skip_broken", [False, True])
def test_layouts(tmp_path, layout, skip_broken):
    files, names, counts = LAYOUTS[layout]
    for file in files:
        # What is passed over must not even be opened.
        good = file.lower().endswith("png") and not any(p[0] in ".@$_" for p in file.split("/"))
        write(tmp_path / "root" / file, None if good else b"no picture")
    dataset = load_dataset("folder", root=tmp_path / "root", image_size=8, skip_broken=skip_broken)
    assert dataset.class_names == tuple(names)
    assert dataset.labels.bincount(minlength=len(names)).tolist() == counts
    assert dataset.tensors()[0].shape[0] == sum(counts)
    assert dataset.skipped == []


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (["wrapper/a/1.png", "wrapper/b/1.png"], "train", "one class folder, 'wrapper', that ho"),
        (["__MACOSX/a/1.png", "wrapper/a/1.png", "wrapper/b/1.png"], "train", "give .*wrapper"),
        (["test/1.png"], "train", "has no folder 'train'"),
        (["train/a/1.png"], "test", "has no folder 'test' or 'val'"),
        (["train/a/1.png", "test/b/1.png"], "test", "b: the training split has no such class"),
        (["train/a/1.png", "test/1.png"], "test", "the training split has no such class"),
        (["a/1.png", "b/notes.txt", "c/x.csv"], "train", "b: no images .* 1 more class folders"),
        (["notes.txt"], "train", "no class folders and no images"),
        (["__MACOSX/a/1.png"], "train", "no class folders and no images"),
    ],
)
def test_layouts_that_are_refused(tmp_path, files, split, message):
    for file in files:
        write(tmp_path / file, None if file.endswith("png") else b"")
    with pytest.raises((OSError, ValueError), match=message) as caught:
        load_dataset("folder", root=tmp_path, split=split, image_size=8)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_links_are_followed(tmp_path):
    write(tmp_path / "elsewhere" / "1.png")
    write(tmp_path / "root" / "a" / "2.png")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "a" / "3.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "root" / "a" / "loop").symlink_to(tmp_path / "root" / "a")
    dataset = load_dataset("folder", root=tmp_path / "root", image_size=8)
    assert dataset.labels.tolist() == [0, 0, 1]


BAD = {
    "empty.png": b"", "empty.jpg": b"", "text.png": b"hello", "page.jpg": b"<html></html>",
    "zeros.webp": bytes(1000), "pickle.png": b"\x80\x04.", "svg.png": b"<svg></svg>",
    **{f"cut{suffix}": truncated(suffix)
       for suffix in (".png", ".jpg", ".webp", ".bmp", ".gif", ".tif")},
    **{f"head{suffix}": truncated(suffix, 0.02) for suffix in (".png", ".jpg", ".webp")},
}  # fmt: skip
SPECIAL = ["link.png", "pipe.png", "loose.png"]


@pytest.fixture
def bad_folder(tmp_path):
    """Two good images of two classes, and every sort of bad file."""
    for name in ("a", "b"):
        write(tmp_path / name / "good.png")
    for number, (name, data) in enumerate(BAD.items()):
        write(tmp_path / "ab"[number % 2] / "deep" / name, data)
    (tmp_path / "a" / "link.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    write(tmp_path / "loose.png")
    return tmp_path


@pytest.mark.parametrize("decoded", [True, False])
def test_all_bad_files_are_listed_at_once(bad_folder, decoded, monkeypatch):
    """Also where a set is too large to be decoded at the start."""
    if not decoded:
        monkeypatch.setattr("ecar.data.folder._DECODE_ALL_BELOW", 0)
    count = len(BAD) + len(SPECIAL)
    with pytest.raises(BadImageError) as caught:
        load_dataset("folder", root=bad_folder, image_size=8)
    message = str(caught.value)
    assert message.startswith(f"{bad_folder}: {count} of {count + 2} files are not readable images")
    assert f"and {count - 10} more" in message and "argument 'skip_broken'" in message
    assert "\n" not in message and len(message) < 2000
    assert {os.path.basename(path) for path, _ in caught.value.files} == {*BAD, *SPECIAL}
    reasons = {os.path.basename(path): why for path, why in caught.value.files}
    assert reasons["empty.png"] == reasons["empty.jpg"] == "the file is empty"
    assert reasons["link.png"] == "a broken link"
    assert reasons["loose.png"] == "lies in no class folder"


def test_skip_broken_goes_on_and_says_how_many(bad_folder):
    count = len(BAD) + len(SPECIAL)
    with pytest.warns(UserWarning, match=f"{count} of {count + 2} files are left out"):
        dataset = load_dataset("folder", root=bad_folder, image_size=8, skip_broken=True, flip=True)
    assert dataset.labels.tolist() == [0, 1, 0, 1] and len(dataset.skipped) == count
    assert dataset.tensors()[0].shape == (4, 3, 8, 8)


def test_a_class_is_not_skipped_whole(tmp_path):
    write(tmp_path / "a" / "1.png")
    write(tmp_path / "b" / "1.png", b"")
    with pytest.raises(OSError, match=r"b/1\.png: not a readable image"):
        load_dataset("folder", root=tmp_path, image_size=8, skip_broken=True)


@pytest.mark.parametrize("name", ["digits", "latents"])
@pytest.mark.parametrize("option", [{"skip_broken": True}, {"background": "black"}])
def test_options_of_folders_only(tmp_path, name, option):
    with pytest.raises(ValueError, match=f"argument '{next(iter(option))}': only 'folder'"):
        load_dataset(name, root=tmp_path, **option)

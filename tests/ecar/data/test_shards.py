"""Tar files of the WebDataset format: read where they lie, shuffled, shared, resumed, refused."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ecar.data import load_dataset
from ecar.data.load import dataset_sizes, find_dataset
from ecar.images import BadImageError
from ecar.training.batches import Batches

webdataset = pytest.importorskip("webdataset", reason="needs ecar[shards]")
CLASSES = 3


def encoded(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def write_shards(folder, count=4, each=3):
    """As webdataset writes them; returns the pictures and labels in order."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, labels = [], []
    for shard in range(count):
        with webdataset.TarWriter(str(folder / f"{shard:04d}.tar")) as writer:
            for row in range(each):
                pictures.append(torch.randint(0, 256, (10, 8, 3), dtype=torch.uint8).numpy())
                labels.append((shard + row) % CLASSES)
                data = encoded(Image.fromarray(pictures[-1]))
                key = f"n{shard}/{row:06d}"
                writer.write({"__key__": key, "png": data, "cls": labels[-1], "json": {"a": 1}})
    return pictures, labels


@pytest.fixture
def shards(tmp_path):
    """The folder of four tar files of three images each, and what they hold."""
    return tmp_path / "data", *write_shards(tmp_path / "data")


def test_images_are_those_of_a_folder(shards, tmp_path):
    root, pictures, labels = shards
    dataset = load_dataset("shards", root=root, image_size=8)
    assert (len(dataset), dataset.class_names) == (12, ("0", "1", "2"))
    assert dataset.labels.tolist() == labels
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        place = tmp_path / "folder" / str(label) / f"{number:04d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place)
    for flip in (False, True):
        images, classes = load_dataset("shards", root=root, image_size=8, flip=flip).tensors()
        order = classes.sort(stable=True).indices if not flip else None
        other = load_dataset("folder", root=tmp_path / "folder", image_size=8, flip=flip)
        if flip:
            half = classes[:12].sort(stable=True).indices
            order = torch.cat([half, half + 12])
        assert torch.equal(images[order], other.tensors()[0])
    assert torch.equal(dataset.decoded().tensors()[0], dataset.tensors()[0])


def test_places(shards, monkeypatch):
    root, _, labels = shards
    monkeypatch.chdir(root.parent)
    for place in ("data", "data/{0000..0003}.tar", "data/*.tar", "data/000{0,1,2,3}.tar"):
        assert load_dataset("shards", root=place, image_size=8).labels.tolist() == labels
    some = load_dataset("shards", root="data/{0003,0001}.tar", image_size=8)
    assert some.labels.tolist() == labels[9:] + labels[3:6]
    assert load_dataset("shards", root="data/0002.tar", image_size=8).labels.tolist() == labels[6:9]
    assert find_dataset("data") == ("shards", "data")
    assert find_dataset("data/{0000..0003}.tar") == ("shards", "data/{0000..0003}.tar")
    assert dataset_sizes("shards", "data") == {"num_classes": CLASSES}
    with pytest.raises(FileNotFoundError, match="no held-out one"):
        load_dataset("shards", root="data/*.tar", split="test", image_size=8)


def test_splits_and_names(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        write_shards(tmp_path / split, count)
    (tmp_path / "classnames.txt").write_text("robin\nwren\nheron\nowl\n")
    train = load_dataset("shards", root=tmp_path, image_size=8)
    test = load_dataset("shards", root=tmp_path, split="test", image_size=8)
    assert (len(train), len(test)) == (9, 3)
    assert train.class_names == test.class_names == ("robin", "wren", "heron", "owl")
    (tmp_path / "classnames.txt").write_text("robin\nwren\n")
    with pytest.raises(ValueError, match=r"\.tar: holds class 2, but classnames.txt names 2"):
        load_dataset("shards", root=tmp_path, image_size=8)


def batches(dataset, **options):
    return Batches(
        dataset, seed=5, batch_size=4, accumulation=1, stages=2, shape=(3, 8, 8),
        label_dropout=0.0, null_class=CLASSES, flip=False, **{"workers": 0, **options},
    )  # fmt: skip


def test_processes_and_workers_read_each_image_once_an_epoch_in_an_order_of_its_own(shards):
    """And a training that goes on sees what it would have seen."""
    root, pictures, _ = shards
    dataset = load_dataset("shards", root=root, image_size=8)
    alone = [part[0].latents for part in batches(dataset).steps(0, 6)]
    shares = [
        list(batches(dataset, rank=rank, world=2, workers=rank).steps(0, 6)) for rank in (0, 1)
    ]
    for step, whole in enumerate(alone):
        assert torch.equal(torch.cat([share[step][0].latents for share in shares]), whole)
    resumed = [part[0].latents for part in batches(dataset).steps(4, 6)]
    assert torch.equal(torch.cat(resumed), torch.cat(alone[4:]))
    epochs = torch.cat(alone).split(len(pictures))
    assert not torch.equal(*epochs)
    images = dataset.tensors()[0]
    for epoch in epochs:
        found = [int((images == image).flatten(1).all(1).nonzero()) for image in epoch]
        assert sorted(found) == list(range(len(pictures)))


def test_workers_get_it_pickled(shards):
    dataset = load_dataset("shards", root=shards[0], image_size=8)
    again = pickle.loads(pickle.dumps(dataset))
    read = [images for images, _ in DataLoader(again, batch_size=5, num_workers=1)]
    assert torch.equal(torch.cat(read), dataset.tensors()[0])


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


PNG = encoded(Image.fromarray(np.zeros((8, 8, 3), np.uint8)))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": PNG}, "sample 'a': has no member '.cls'"),
        ({"a.cls": b"1"}, "sample 'a': expected one image, got 0"),
        ({"a.png": PNG, "a.jpg": PNG, "a.cls": b"1"}, "sample 'a': expected one image, got 2"),
        ({"a.png": PNG, "a.cls": b"cat"}, "expected a class's number in '.cls', got b'cat'"),
        ({"a.png": PNG, "a.cls": b"-1"}, "expected a class's number in '.cls', got b'-1'"),
        ({"a.png": PNG, "a.cls": b"1", "b.txt": b"", "a.PNG": PNG}, None),
        ({"a.png": PNG, "a.PNG": PNG, "a.cls": b"1"}, "duplicate file name"),
        ({"a.txt": b"words"}, "holds no samples, of an image and a '.cls' of one name each"),
        ({}, "holds no samples"),
    ],
)
def test_samples_that_are_none(tmp_path, members, message):
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ValueError) as caught:
        load_dataset("shards", root=tmp_path, image_size=8)
    assert (message or "sample 'a': has no member '.cls'") in str(caught.value)
    assert "x.tar" in str(caught.value)


def test_files_that_are_none(shards):
    root, *_ = shards
    first = root / "0000.tar"
    whole = first.read_bytes()

    def refused(kind, message, where=root):
        with pytest.raises(kind, match=message):
            load_dataset("shards", root=where, image_size=8)

    first.write_bytes(whole[:1000])
    refused(ValueError, r"0000\.tar: not an uncompressed tar file, or cut short")
    first.write_bytes(b"no tar")
    refused(ValueError, r"0000\.tar: not an uncompressed tar file, or cut short")
    with tarfile.open(first, "w:gz") as archive:
        archive.add(root / "0001.tar", "a.png")
    refused(ValueError, r"0000\.tar: not an uncompressed tar file")
    first.unlink()
    refused(FileNotFoundError, r"0000\.tar: no such file", root / "{0000..0003}.tar")
    refused(FileNotFoundError, r"x\*\.tar: no such file", root / "x*.tar")
    refused(FileNotFoundError, "nowhere: no such folder", root / "nowhere")
    refused(ValueError, r"\{0\.tar: ", root / "{0.tar")
    (root / "empty").mkdir()
    refused(FileNotFoundError, "empty: no tar files", root / "empty")
    with pytest.raises(TypeError, match="argument 'image_size'"):
        load_dataset("shards", root=root)


def test_a_tar_file_that_is_cut_or_damaged_anywhere_is_refused(shards):
    """Also between members and in a header, where tarfile takes it for the end."""
    root, *_ = shards
    file = root / "0000.tar"
    whole = file.read_bytes()
    with tarfile.open(file) as archive:
        members = archive.getmembers()
        end = archive.offset
    damaged = [whole[: member.offset + 5] + b"x" + whole[member.offset + 6 :] for member in members]
    for content in (*(whole[:cut] for cut in range(0, end + 512, 256)), *damaged):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"0000\.tar: not an uncompressed tar file, or cut"):
            load_dataset("shards", root=root, image_size=8)
    file.write_bytes(whole[: end + 512])  # one block of zeros is an end
    assert len(load_dataset("shards", root=root, image_size=8)) == 12


def test_an_image_that_is_none_is_named_by_its_place(tmp_path):
    members = {"a.png": PNG, "a.cls": b"0", "b.png": PNG[:30], "b.cls": b"0", "c.png": b"",
               "c.cls": b"0"}  # fmt: skip
    write_tar(tmp_path / "x.tar", members)
    dataset = load_dataset("shards", root=tmp_path, image_size=8)
    dataset[0]
    for row, reason in ((1, r"x\.tar, byte [\d,]+: not a readable image \("), (2, "is empty")):
        with pytest.raises(BadImageError, match=reason):
            dataset[row]
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(BadImageError, match="the tar file is cut short"):
        dataset[0]


def test_skip_broken_goes_on_and_says_how_many(tmp_path):
    members = {"a.png": PNG, "a.cls": b"0", "b.png": PNG[:30], "b.cls": b"1", "c.png": b"",
               "c.cls": b"2", "d.png": PNG, "d.cls": b"2"}  # fmt: skip
    write_tar(tmp_path / "x.tar", members)
    message = r"2 of 4 images are left out, which are not readable; the first is .*x\.tar, byte "
    with pytest.warns(UserWarning, match=message):
        dataset = load_dataset("shards", root=tmp_path, image_size=8, skip_broken=True, flip=True)
    assert dataset.labels.tolist() == [0, 2, 0, 2] and dataset.num_classes == 3
    assert [reason for _, reason in dataset.skipped][1] == "the file is empty"
    images = [image for image, _ in dataset]
    assert images[1].equal(images[0]) and images[2].equal(images[0].flip(-1))
    write_tar(tmp_path / "x.tar", {"b.png": PNG[:30], "b.cls": b"1"})
    with pytest.raises(BadImageError, match=r"x\.tar, byte [\d,]+: not a readable image"):
        load_dataset("shards", root=tmp_path, image_size=8, skip_broken=True)


def test_skip_broken_of_none(shards):
    root, *_ = shards
    plain, skipping = (
        load_dataset("shards", root=root, image_size=8, skip_broken=skip) for skip in (False, True)
    )
    assert skipping.skipped == [] and len(skipping) == len(plain)


def test_training_and_caching_take_them_by_their_path(shards, tmp_path, monkeypatch, capsys):
    from ecar.cli import main

    monkeypatch.chdir(tmp_path)
    words = (
        "train --preset digits --channels 3 --dataset data/{0000..0003}.tar --output out --steps 1 "
        "--batch-size 2 --num-workers 0 --device cpu --sample-every 0 --no-progress"
    )
    assert main(words.split()) == 0, capsys.readouterr().err
    values = json.loads((tmp_path / "out" / "train.json").read_text())
    assert (values["dataset"], values["data_root"]) == ("shards", "data/{0000..0003}.tar")
    assert values["model"]["num_classes"] == CLASSES

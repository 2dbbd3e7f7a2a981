"""`load_dataset` and the data sets that come with the project."""

from __future__ import annotations

import difflib
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import ImageDataset, InMemoryDataset, checked_labels
from .folder import FolderDataset, folder_classes
from .latents import INDEX, LatentDataset
from .shards import ShardDataset

IN_FILES = ("folder", "shards", "latents")  # of the user, who says where
DATASETS = ("digits", "mnist", "emoji", *IN_FILES)
_TEN = tuple(str(digit) for digit in range(10))


def load_dataset(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    split: str = "train",
    image_size: int | None = None,
    channels: int | None = None,
    flip: bool = False,
    verify: bool = True,
    skip_broken: bool = False,
    background: str | tuple[int, int, int] = "white",
) -> ImageDataset:
    """Open a data set by name.

    name        what                                                     C, H, W     train / test
    "digits"    scikit-learn's load_digits                               1, 8, 8     1,437 / 360
    "mnist"     data/mnist.npz, padded from 28 to 32 pixels              1, 32, 32   60,000 / 10,000
    "emoji"     data/emoji.npz, Noto Emoji on white, 28 classes          3, 32, 32   2,568 / 303
    "folder"    root/class/file.png (and other formats)                  C, size, size
    "shards"    root/*.tar of the WebDataset format, or a pattern        C, size, size
    "latents"   root/index.json and shards, from `cache_latents`         the codec's

    Args:
        root: "mnist", "emoji": the file or its folder; by default looked for in $ECAR_DATA, the
            project's data folder and ./data. "folder", "shards", "latents": required. If `root`
            holds one folder for each split ("train", and "test" or "val"), the split is read from
            there. Of "shards" it may be a pattern, such as "train-{000..099}.tar".
        split: "train" or "test".
        image_size, channels: of "folder" and "shards" only: the side in pixels (required) and 1 or
            3 (default). For the others they may be given to check what is loaded.
        flip: of "folder" and "shards" only: also every image mirrored, at index len / 2 + i.
        verify: "folder" only: try to open all images now (see `FolderDataset`).
        skip_broken: of "folder" and "shards" only: go on without files that are no readable images,
            with a warning that says how many; without it they are an error, which names them.
        background: of "folder" and "shards" only: the colour that transparent images lie on: a
            name, "#rrggbb" or (r, g, b).

    Raises:
        ValueError, TypeError: an argument is wrong, or files are not what they should be.
        OSError: files are missing or unreadable. Messages name the path.
    """
    if name not in DATASETS:
        raise ValueError(f"argument 'name': expected one of {', '.join(DATASETS)}, got {name!r}")
    if split not in ("train", "test"):
        raise ValueError(f"argument 'split': expected 'train' or 'test', got {split!r}")
    if name in IN_FILES and root is None:
        raise ValueError(f"argument 'root': the data set {name!r} needs a folder, got None")
    if name == "folder":
        return FolderDataset(
            cast("str", root), split=split, image_size=cast("int", image_size), channels=channels,
            flip=flip, verify=verify, skip_broken=skip_broken, background=background,
        )  # fmt: skip
    if name == "shards":
        return ShardDataset(
            cast("str", root), split=split, image_size=cast("int", image_size), channels=channels,
            flip=flip, skip_broken=skip_broken, background=background,
        )  # fmt: skip
    if skip_broken:
        raise ValueError(
            f"argument 'skip_broken': only 'folder' and 'shards' have files to skip, not {name!r}"
        )
    if flip:
        raise ValueError(f"argument 'flip': only 'folder' can be mirrored, not {name!r}")
    if background != "white":
        raise ValueError(f"argument 'background': only 'folder' has transparency, not {name!r}")
    if name == "digits":
        dataset = _digits(split)
    elif name == "mnist":
        dataset = _mnist(find_npz("mnist", root), split)
    elif name == "emoji":
        dataset = _emoji(find_npz("emoji", root), split)
    else:
        dataset = LatentDataset(cast("str", root), split=split)
    _check_shape(dataset, image_size, channels)
    return dataset


def find_dataset(text: str) -> tuple[str, str | None]:
    """A data set's name, or a path: the name of what lies there, and the path.

    Raises:
        FileNotFoundError: no such path. ValueError: neither.
    """
    if text in DATASETS:
        return text, None
    path = Path(text)
    if text.endswith(".tar"):
        return "shards", text
    if path.is_dir():
        places = (path, path / "train")
        if any((place / INDEX).is_file() for place in places):
            return "latents", text
        tars = any(any(place.glob("*.tar")) for place in places)
        return "shards" if tars else "folder", text
    if path.name != text:
        raise FileNotFoundError(f"{text}: no such folder, and not a pattern that ends in .tar")
    near = difflib.get_close_matches(text, DATASETS, n=1)
    raise ValueError(
        f"argument 'dataset': expected one of {', '.join(DATASETS)} or a path, got {text!r}"
        + (f"; near it: {near[0]}" if near else "")
    )


def dataset_sizes(name: str, root: str | os.PathLike[str]) -> dict[str, int]:
    """What a model must have for images of a folder or of shards, or for latents.

    Returns: "num_classes"; of "latents" also "channels" and "image_size", the side in pixels.
    Raises:
        OSError, ValueError: as `load_dataset`.
    """
    if name == "folder":
        return {"num_classes": len(folder_classes(root))}
    if name == "shards":
        return {"num_classes": ShardDataset(root, image_size=1).num_classes}
    if name == "latents":
        latents = LatentDataset(root)
        channels, side, _ = latents.shape
        return {"num_classes": latents.num_classes, "channels": channels, "image_size": side}
    raise ValueError(f"argument 'name': expected 'folder', 'shards' or 'latents', got {name!r}")


def _check_shape(dataset: ImageDataset, image_size: int | None, channels: int | None) -> None:
    have_channels, height, width = dataset.shape
    if image_size is not None and not height == width == image_size:
        raise ValueError(
            f"argument 'image_size': {dataset.name!r} is {height} x {width}, got {image_size!r}"
        )
    if channels is not None and channels != have_channels:
        raise ValueError(
            f"argument 'channels': {dataset.name!r} has {have_channels}, got {channels!r}"
        )


def _digits(split: str) -> ImageDataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the data set 'digits' needs scikit-learn: pip install scikit-learn"
        ) from error
    bunch = load_digits()
    # 36 held-out images of each class. RandomState's stream is frozen by numpy, so the split
    # is the same with every version of numpy and scikit-learn.
    random = np.random.RandomState(0)
    held_out = np.zeros(len(bunch.target), dtype=bool)
    for digit in range(10):
        members = np.flatnonzero(bunch.target == digit)
        held_out[random.permutation(members)[:36]] = True
    chosen = held_out if split == "test" else ~held_out
    pixels = torch.from_numpy(bunch.images[chosen].astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target[chosen].astype(np.int64))
    return InMemoryDataset("digits", split, pixels, labels, _TEN, maximum=16)


def find_npz(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """The path of NAME.npz: `root` itself or in it, else $ECAR_DATA, the project, ./data.

    Raises:
        FileNotFoundError: naming the places where it was looked for.
    """
    if root is not None:
        places = [Path(root)]
    else:
        project = Path(__file__).resolve().parents[2]
        places = [project / "data", Path("data")]
        if os.environ.get("ECAR_DATA"):
            places.insert(0, Path(os.environ["ECAR_DATA"]))
    candidates = [p if p.suffix == ".npz" else p / f"{name}.npz" for p in places]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    tried = ", ".join(str(c) for c in candidates)
    raise FileNotFoundError(
        f"{name}.npz not found (tried {tried}): set ECAR_DATA or root to the folder that holds it "
        f"(it is data/{name}.npz in the project's repository)"
    )


def _read_npz(path: Path, split: str, shape: Sequence[int], *names: str) -> list[np.ndarray]:
    """This split's images and labels, and the arrays of these names.

    Raises:
        ValueError: naming the path, where they are not there or have other types or shapes.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
            others = [archive[name] for name in names]
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not the project's {path.name} ({error})") from error
    wanted = (np.uint8, tuple(shape), (shape[0],))
    if (images.dtype, images.shape, labels.shape) != wanted:
        raise ValueError(
            f"{path}: expected uint8 images {list(shape)} and as many labels, got "
            f"{images.dtype} {list(images.shape)} with {list(labels.shape)} labels"
        )
    return [images, labels, *others]


def _mnist(path: Path, split: str) -> ImageDataset:
    count = {"train": 60000, "test": 10000}[split]
    images, labels = _read_npz(path, split, (count, 28, 28))
    pixels = F.pad(torch.from_numpy(images).unsqueeze(1), (2, 2, 2, 2))
    return _in_memory("mnist", split, path, pixels, labels, _TEN)


def _emoji(path: Path, split: str) -> ImageDataset:
    count = {"train": 2568, "test": 303}[split]
    images, labels, names = _read_npz(path, split, (count, 3, 32, 32), "class_names")
    pixels = torch.from_numpy(images)
    return _in_memory("emoji", split, path, pixels, labels, [str(name) for name in names])


def _in_memory(
    name: str, split: str, path: Path, pixels: Tensor, labels: np.ndarray, names: Sequence[str]
) -> ImageDataset:
    try:
        return InMemoryDataset(name, split, pixels, checked_labels(labels, len(names)), names)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None

"""Images in tar files of the WebDataset format."""

from __future__ import annotations

import glob
import os
import re
import tarfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ecar.images import BadImageError, parse_background, read_image

from .folder import EXTENSIONS, PictureDataset, check_size, split_folder

NAMES = "classnames.txt"
_PATTERN = re.compile(r"[*?\[{]")


class ShardDataset(PictureDataset):
    """Tar files whose samples are an image and its class: 000012.jpg and 000012.cls, and so on.

    Only the tar files' headers are read at construction. After that an image is read where it lies,
    in any order: so it is shuffled, resumed and shared among processes and workers as other data
    sets are, and every epoch sees each image once. Members of other suffixes are passed over.
    Images are read, cut and mirrored as in a `FolderDataset`.

    Args:
        root: a folder of tar files, which may have a folder for each split; one tar file; or a
            pattern with braces or wildcards, such as "imagenet/train-{0000..0099}.tar", which is
            the training split. A file `classnames.txt` next to the tar files, a line for each
            class, names the classes; without it they are 0 .. the highest that there is.
        skip_broken: decode all images now, and go on without those that can't be read, with a
            warning that says how many.

    Attributes:
        skipped: the place of each image left out by `skip_broken`, and why.

    Raises:
        ImportError: webdataset is not installed.
        FileNotFoundError: no such file or folder, no tar files.
        BadImageError: an OSError and a ValueError, where `skip_broken` leaves no image.
        ValueError, TypeError: a wrong argument; a tar file that is compressed, cut short or holds
            something else. Messages name the file.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str = "train",
        image_size: int,
        channels: int | None = None,
        flip: bool = False,
        skip_broken: bool = False,
        background: str | tuple[int, int, int] = "white",
    ) -> None:
        check_size(image_size, channels)
        parse_background(background)
        self._shards = shard_files(root, split)
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            found = list(pool.map(_samples, self._shards))
        labels = np.concatenate([labels for _, labels in found])
        # Of each image the number of its tar file, where it begins and its bytes.
        self._places = np.concatenate(
            [np.insert(places, 0, number, axis=1) for number, (places, _) in enumerate(found)]
        )
        names = class_names(self._shards[0]) or [str(k) for k in range(labels.max() + 1)]
        if labels.max() >= len(names):
            number = int(self._places[labels.argmax()][0])
            raise ValueError(
                f"{self._shards[number]}: holds class {labels.max()}, but {NAMES} names "
                f"{len(names)} classes"
            )
        self.skipped: list[tuple[str, str]] = []
        if skip_broken:
            labels = self._without_broken(os.fspath(root), labels)
        super().__init__(
            "shards", split, names, torch.from_numpy(labels),
            image_size=image_size, channels=channels, flip=flip, background=background,
        )  # fmt: skip

    def _read(self, index: int) -> Image.Image:
        name, data = self._content(index)
        return read_image(name, self.shape[0], background=self._background, data=data)

    def _content(self, index: int) -> tuple[str, bytes]:
        """What an image is called in errors, and its file's bytes."""
        number, offset, size = self._places[index].tolist()
        path = self._shards[number]
        # Opened each time: more tar files than a process may hold open are common.
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        name = f"{path}, byte {offset:,}"
        if len(data) < size:
            raise BadImageError([(name, "the tar file is cut short")])
        return name, data

    def _why_broken(self, index: int) -> tuple[str, str] | None:
        """None for a readable image, else its name and the reason."""
        try:
            name, data = self._content(index)
            read_image(name, data=data)
        except BadImageError as error:
            return error.files[0]
        return None

    def _without_broken(self, root: str, labels: np.ndarray) -> np.ndarray:
        """The labels of images that can be read, whose places alone are kept."""
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            found = list(pool.map(self._why_broken, range(len(labels))))
        self.skipped = [broken for broken in found if broken is not None]
        if not self.skipped:
            return labels
        if len(self.skipped) == len(labels):
            raise BadImageError(self.skipped, folder=root, total=len(labels))
        name, reason = self.skipped[0]
        warnings.warn(
            f"{root}: {len(self.skipped):,} of {len(labels):,} images are left out, which are not "
            f"readable; the first is {name} ({reason})",
            stacklevel=4,
        )
        good = np.array([broken is None for broken in found])
        self._places = self._places[good]
        return labels[good]


def shard_files(root: str | os.PathLike[str], split: str) -> list[str]:
    """The tar files of a split, sorted within a folder or wildcard."""
    text = os.fspath(root)
    if not _PATTERN.search(text) and not text.endswith(".tar"):
        folder = split_folder(Path(text), split, lambda path: any(path.glob("*.tar")))
        files = sorted(str(path) for path in folder.glob("*.tar"))
        if not files:
            raise FileNotFoundError(f"{folder}: no tar files")
        return files
    if split != "train":
        raise FileNotFoundError(f"{text}: names the training split, and no held-out one")
    files = []
    for name in _expanded(text):
        matches = sorted(glob.glob(name)) if _PATTERN.search(name) else [name]
        missing = [file for file in matches or [name] if not os.path.isfile(file)]
        if missing:
            raise FileNotFoundError(f"{missing[0]}: no such file")
        files += matches
    return files


def class_names(shard: str) -> list[str] | None:
    """What `classnames.txt` in the tar file's folder, or in the one above, has as names."""
    for folder in (Path(shard).parent, Path(shard).absolute().parent.parent):
        if (folder / NAMES).is_file():
            return (folder / NAMES).read_text(encoding="utf-8").strip().splitlines()
    return None


def _samples(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Where each image of a tar file lies, int64 [n, 2] of offset and bytes, and its class."""
    places, labels = [], []
    with open(path, "rb") as file:
        for sample in _grouped(path):
            key = f"{path}: sample {sample['__key__']!r}"
            images = [place for name, place in sample.items() if f".{name}" in EXTENSIONS]
            if not images and "cls" not in sample:
                continue
            if len(images) != 1:
                raise ValueError(f"{key}: expected one image, got {len(images)}")
            if "cls" not in sample:
                raise ValueError(f"{key}: has no member '.cls', which holds its class's number")
            offset, size = sample["cls"]
            file.seek(offset)
            text = file.read(min(size, 64)).strip()
            if not re.fullmatch(rb"\d{1,9}", text):
                raise ValueError(f"{key}: expected a class's number in '.cls', got {text!r}")
            places.append(images[0])
            labels.append(int(text))
    if not places:
        raise ValueError(f"{path}: holds no samples, of an image and a '.cls' of one name each")
    return np.array(places, np.int64), np.array(labels, np.int64)


def _grouped(path: str) -> Iterator[dict[str, Any]]:
    """Samples by webdataset's rules: a name up to its first dot, then suffixes in lower case. Each
    suffix has the place of its file, not what it holds."""
    try:
        from webdataset.tariterators import group_by_keys
    except ImportError as error:
        raise ImportError(_MISSING) from error
    try:
        yield from group_by_keys(_members(path))
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not an uncompressed tar file, or cut short ({error})") from None
    except ValueError as error:  # two files of one name
        raise ValueError(f"{path}: {error.args[0]}") from None


def _members(path: str) -> Iterator[dict[str, Any]]:
    """Files in a tar file as webdataset has them, with their places for their data."""
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isreg():
                place = (member.offset_data, member.size)
                yield {"fname": member.name, "data": place, "__url__": path}
        # Where a header is cut or damaged, tarfile stops as at the end, which is a block of zeros.
        with open(path, "rb") as file:
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header at byte {archive.offset:,}")


def _expanded(pattern: str) -> Iterator[str]:
    """ "a-{0..9}.tar" -> "a-0.tar", .., as shells do."""
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise ImportError(_MISSING) from error
    try:
        yield from braceexpand(pattern)
    except ValueError as error:
        raise ValueError(f"{pattern}: {error}") from None


_MISSING = "the data set 'shards' needs webdataset: pip install 'ecar[shards]'"

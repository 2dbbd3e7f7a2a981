"""Images in one folder per class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ecar.images import BadImageError, check_image, parse_background, read_image

from .base import ImageDataset, InMemoryDataset

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_DECODE_ALL_BELOW = 128 << 20  # bytes
_SPLITS = {"train": ("train",), "test": ("test", "val")}
_SPLIT_NAMES = {"train", "test", "val"}
# What archives, file managers and disks leave behind; hidden ones are passed over, too.
_LITTER = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
_HINT = "argument 'skip_broken' goes on without them"


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve by box filter, then bicubic, then cut the middle `size` x `size`."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def split_folder(root: Path, split: str, is_layout: Callable[[Path], object]) -> Path:
    """root/split ("val" also serves as "test") if `is_layout` says so, else `root` for "train"."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    for name in _SPLITS[split]:
        if is_layout(root / name):
            return root / name
    if split == "train":
        return root
    raise FileNotFoundError(f"{root}: has no folder 'test' or 'val' for the held-out split")


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """What a person put into the folder, sorted by name."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        kept = [e for e in entries if e.name[0] != "." and e.name.lower() not in _LITTER]
    return sorted(kept, key=lambda entry: entry.name)


def _subfolders(folder: Path) -> list[str]:
    return [entry.name for entry in _visible(folder) if entry.is_dir()]


def _images(folder: Path) -> list[str]:
    """Paths of the folder's own images, also of links that lead nowhere."""
    return [
        e.path for e in _visible(folder) if e.name.lower().endswith(EXTENSIONS) and not e.is_dir()
    ]


def _images_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of all images in the folder, at any depth. A link to a folder that it lies in is
    passed over."""
    real = os.path.realpath(folder)
    if real in above:
        return
    yield from _images(folder)
    for name in _subfolders(folder):
        yield from _images_below(folder / name, (*above, real))


class PictureDataset(ImageDataset):
    """Pictures read when they are asked for: cut to their centre square and resized as ADM does,
    [-1, 1]. With `flip` twice as many: item len / 2 + i is item i mirrored.

    Args:
        labels: int64 [N], of the pictures as they are.
        image_size: side in pixels.
        channels: 1 or 3 (None).
        background: what transparent pictures lie on.

    Raises:
        ValueError, TypeError: a wrong argument.
    """

    def __init__(
        self,
        name: str,
        split: str,
        class_names: Sequence[str],
        labels: Tensor,
        *,
        image_size: int,
        channels: int | None,
        flip: bool,
        background: str | tuple[int, int, int],
    ) -> None:
        channels = check_size(image_size, channels)
        super().__init__(name, split, (channels, image_size, image_size), class_names)
        self._background = parse_background(background)
        self._labels = labels.repeat(2) if flip else labels
        self._count = len(labels)

    def _read(self, index: int) -> Image.Image:
        """A picture of `channels`, of any size."""
        raise NotImplementedError

    @property
    def labels(self) -> Tensor:
        return self._labels

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = self._row(index)
        return self._pixels(index) / 127.5 - 1, int(self._labels[index])

    def _pixels(self, index: int) -> Tensor:
        """uint8 [C, H, W]."""
        image = center_crop(self._read(index % self._count), self.shape[1])
        array = np.array(image).reshape(*self.shape[1:], self.shape[0])
        pixels = torch.from_numpy(array).permute(2, 0, 1).contiguous()
        return pixels.flip(-1) if index >= self._count else pixels

    def decoded(self) -> InMemoryDataset:
        """All images in memory, as bytes: the same items without reading a file again.

        Raises:
            BadImageError: an image cannot be read.
        """
        pixels = torch.empty(len(self), *self.shape, dtype=torch.uint8)
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for index, image in enumerate(pool.map(self._pixels, range(len(self)))):
                pixels[index] = image
        return InMemoryDataset(self.name, self.split, pixels, self._labels, self.class_names)


def check_size(image_size: Any, channels: Any) -> int:
    """The channels, 3 for None; TypeError or ValueError naming the argument."""
    if not isinstance(image_size, int) or isinstance(image_size, bool):
        raise TypeError(f"argument 'image_size': expected an int, got {image_size!r}")
    if image_size < 1:
        raise ValueError(f"argument 'image_size': expected at least 1, got {image_size}")
    channels = 3 if channels is None else channels
    if channels not in (1, 3):
        raise ValueError(f"argument 'channels': expected 1 or 3, got {channels!r}")
    return channels


class FolderDataset(PictureDataset):
    """root/class_name/**/*.{png,jpg,jpeg,webp,bmp,gif,tif,tiff}; classes are numbered in sorted
    order.

    Images lie at any depth below their class's folder. Images that lie in no class folder are of
    one class if there are no class folders at all, and bad files otherwise. Hidden files, files
    of another suffix, __MACOSX and the like are passed over. Links are followed.

    Images are read as `ecar.images.read_image` says (EXIF, transparency, 16 bits, floats), cut to
    their centre square and resized as ADM does, [-1, 1]. With `flip` the data set is twice as
    long: item len / 2 + i is item i mirrored, so that flipping needs no random state.

    `verify` opens every image at construction, and names all bad files in one error: it decodes
    them if all files together are smaller than 128 MiB, otherwise it reads their headers and their
    ends. `skip_broken` decodes all of them and goes on without those that can't be read, with a
    warning that says how many.

    Attributes:
        skipped: the path of each file left out by `skip_broken`, and why.

    Raises:
        OSError: no such folder, no classes, no images in a class.
        BadImageError: an OSError and a ValueError, of all unreadable images at once.
        ValueError, TypeError: a wrong argument.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str = "train",
        image_size: int,
        channels: int | None = None,
        flip: bool = False,
        verify: bool = True,
        skip_broken: bool = False,
        background: str | tuple[int, int, int] = "white",
    ) -> None:
        check_size(image_size, channels)
        parse_background(background)
        root = Path(root)
        folder, present, names = _classes(root, split)
        found = {name: sorted(_images_below(folder / name)) for name in present}
        loose = _images(folder) if present != [""] else []
        self.skipped: list[tuple[str, str]] = []
        self._leave_out_bad_files(folder, found, loose, verify, skip_broken)
        if empty := [name for name, paths in found.items() if not paths]:
            raise FileNotFoundError(
                f"{folder / empty[0]}: no images (expected {', '.join(EXTENSIONS)})"
                + (f", nor in {len(empty) - 1} more class folders" if len(empty) > 1 else "")
            )
        self._paths = [path for paths in found.values() for path in paths]
        labels = [names.index(name) for name, paths in found.items() for _ in paths]
        super().__init__(
            "folder", split, [name or root.resolve().name for name in names], torch.tensor(labels),
            image_size=image_size, channels=channels, flip=flip, background=background,
        )  # fmt: skip

    def _read(self, index: int) -> Image.Image:
        return read_image(self._paths[index], self.shape[0], background=self._background)

    def _leave_out_bad_files(
        self, folder: Path, found: dict[str, list[str]], loose: list[str], verify: bool, skip: bool
    ) -> None:
        """Raise for all bad files at once, or take them out of `found` and warn."""
        paths = [path for paths in found.values() for path in paths]
        bad = dict.fromkeys(loose, "lies in no class folder")
        if verify or skip:
            sizes = (os.path.getsize(path) for path in paths if os.path.isfile(path))
            decode = skip or sum(sizes) < _DECODE_ALL_BELOW
            with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
                reasons = pool.map(lambda path: check_image(path, decode=decode), paths)
                bad |= {path: why for path, why in zip(paths, reasons, strict=True) if why}
        if not bad:
            return
        total = len(paths) + len(loose)
        error = BadImageError(list(bad.items()), folder=str(folder), total=total, hint=_HINT)
        if not skip:
            raise error
        for name, paths in found.items():
            found[name] = [path for path in paths if path not in bad]
            if paths and not found[name]:
                raise error
        self.skipped = error.files
        warnings.warn(
            f"{folder}: {len(bad):,} of {total:,} files are left out, which are not readable "
            f"images; the first is {error.files[0][0]} ({error.files[0][1]})",
            stacklevel=4,
        )


def _locate(root: Path, split: str) -> Path:
    """The folder of a split: root/split, or for "train" the root itself."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    names = _subfolders(root)
    # "test" may be a class, or hold classes, or, where no other names are there, images alone.
    flat = bool(names) and set(names) <= _SPLIT_NAMES
    for name in _SPLITS[split]:
        if name in names and (flat or _subfolders(root / name)):
            return root / name
    if split == "train" and not flat:
        return root
    expected = "'train'" if split == "train" else "'test' or 'val' for the held-out split"
    raise FileNotFoundError(f"{root}: has no folder {expected}")


def _class_folders(root: Path, folder: Path) -> list[str]:
    """Names of the class folders of a split; [""] where images lie in none."""
    names = _subfolders(folder)
    if folder == root:
        names = [n for n in names if n not in _SPLIT_NAMES or not _subfolders(root / n)]
    if not names:
        if _images(folder):
            return [""]
        raise FileNotFoundError(
            f"{folder}: no class folders and no images (expected {folder}/class/image)"
        )
    inner = _subfolders(folder / names[0])
    if len(names) == 1 and len(inner) > 1 and not _images(folder / names[0]):
        raise FileNotFoundError(
            f"{folder}: one class folder, {names[0]!r}, that holds folders ({inner[0]}, {inner[1]},"
            f" ..); if those are the classes, give {folder / names[0]}"
        )
    return names


def folder_classes(root: str | os.PathLike[str]) -> list[str]:
    """Names of the classes of a folder's training split, as its folders are called."""
    return _classes(Path(root), "train")[2]


def _classes(root: Path, split: str) -> tuple[Path, list[str], list[str]]:
    """A split's folder, its class folders, and those of the training split, which has all."""
    folder = _locate(root, split)
    present = _class_folders(root, folder)
    if split == "train":
        return folder, present, present
    try:
        names = _class_folders(root, _locate(root, "train"))
    except FileNotFoundError:
        return folder, present, present
    if unknown := sorted(set(present) - set(names)):
        raise ValueError(f"{folder / unknown[0]}: the training split has no such class")
    return folder, present, names

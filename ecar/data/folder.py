"""Images in one folder per class."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .base import ImageDataset

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_DECODE_ALL_BELOW = 128 << 20  # bytes


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
    for name in (split, "val") if split == "test" else (split,):
        if is_layout(root / name):
            return root / name
    if split == "train":
        return root
    raise FileNotFoundError(f"{root}: has no folder 'test' or 'val' for the held-out split")


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


class FolderDataset(ImageDataset):
    """root/class_name/*.{png,jpg,jpeg,webp,bmp}; classes are numbered in sorted order.

    Images are cut to their centre square and resized as ADM does, [-1, 1]. With `flip` the
    data set is twice as long: item len / 2 + i is item i mirrored, so that flipping needs no
    random state.

    `verify` opens every image at construction: it decodes them if all files together are
    smaller than 128 MiB, otherwise it reads their headers.

    Raises:
        OSError: no such folder, no classes, no images in a class, an unreadable image.
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
    ) -> None:
        if not isinstance(image_size, int) or isinstance(image_size, bool):
            raise TypeError(f"argument 'image_size': expected an int, got {image_size!r}")
        if image_size < 1:
            raise ValueError(f"argument 'image_size': expected at least 1, got {image_size}")
        channels = 3 if channels is None else channels
        if channels not in (1, 3):
            raise ValueError(f"argument 'channels': expected 1 or 3, got {channels!r}")

        root = Path(root)
        folder = split_folder(root, split, _subfolders)
        class_names = _subfolders(folder)
        # Labels must mean the same in both splits, also where the held-out one lacks a class.
        if folder != root and _subfolders(root / "train"):
            train_names = _subfolders(root / "train")
            unknown = sorted(set(class_names) - set(train_names))
            if unknown:
                raise ValueError(f"{folder / unknown[0]}: {root / 'train'} has no such class")
            present, class_names = class_names, train_names
        else:
            present = class_names
        if not class_names:
            raise FileNotFoundError(f"{folder}: no class folders (expected {folder}/class/image)")
        super().__init__("folder", split, (channels, image_size, image_size), class_names)

        self._paths, labels = [], []
        for name in present:
            with os.scandir(folder / name) as entries:
                files = sorted(e.path for e in entries if e.name.lower().endswith(EXTENSIONS))
            if not files:
                raise FileNotFoundError(
                    f"{folder / name}: no images (expected {', '.join(EXTENSIONS)})"
                )
            self._paths += files
            labels += [self.class_names.index(name)] * len(files)
        self._labels = torch.tensor(labels * (2 if flip else 1), dtype=torch.int64)
        if verify:
            self._verify()

    @property
    def labels(self) -> Tensor:
        return self._labels

    def _verify(self) -> None:
        decode = sum(os.path.getsize(path) for path in self._paths) < _DECODE_ALL_BELOW
        for path in self._paths:
            with _open(path) as image:
                if decode:
                    _decode(path, image, self.shape[0])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = self._row(index)
        path = self._paths[index % len(self._paths)]
        with _open(path) as image:
            pixels = _decode(path, image, self.shape[0])
        pixels = center_crop(pixels, self.shape[1])
        array = np.array(pixels).reshape(*self.shape[1:], self.shape[0])
        tensor = torch.from_numpy(array).permute(2, 0, 1).contiguous() / 127.5 - 1
        if index >= len(self._paths):
            tensor = tensor.flip(-1)
        return tensor, int(self._labels[index])


def _open(path: str) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: not a readable image ({_reason(path, error)})") from error


def _decode(path: str, image: Image.Image, channels: int) -> Image.Image:
    try:
        return image.convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError) as error:
        raise OSError(f"{path}: not a readable image ({_reason(path, error)})") from error


def _reason(path: str, error: Exception) -> str:
    if os.path.getsize(path) == 0:
        return "the file is empty"
    return str(error).replace("\n", " ")

"""Pictures from tensors: PIL and numpy, sheets, and files that are whole or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ecar.files import atomic_path

__all__ = [
    "check_output_file",
    "check_output_folder",
    "make_sheet",
    "save_image",
    "to_numpy",
    "to_pil",
    "to_unit",
]


def to_unit(images: Tensor) -> Tensor:
    """[B, C, h, w] in [-1, 1] (C = 1 or 3) -> float32 in [0, 1]; what lies outside is clamped."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"argument 'images': expected a floating-point tensor, got {got}")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            "argument 'images': expected a tensor of shape [B, C, h, w] with C = 1 or 3, got "
            f"{list(images.shape)}"
        )
    return (images.float() / 2 + 0.5).clamp(0, 1)


def to_numpy(images: Tensor) -> np.ndarray:
    """[B, C, h, w] in [-1, 1] -> float32 [B, h, w, C] in [0, 1]."""
    return to_unit(images).permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """[B, C, h, w] in [-1, 1] -> B pictures, mode L (C = 1) or RGB (C = 3)."""
    levels = (to_unit(images) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    if levels.shape[-1] == 1:
        levels = levels[..., 0]
    return [Image.fromarray(picture) for picture in levels]


def make_sheet(
    images: Sequence[Image.Image], rows: int, columns: int, padding: int = 2, scale: int = 1
) -> Image.Image:
    """Lay pictures of one size out on a dark grid, row by row.

    Args:
        images: at most ``rows * columns`` pictures of one size and mode; missing ones stay dark.
        padding: pixels around each picture.
        scale: whole factor by which each picture is enlarged, nearest neighbour.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    for name, value, least in (
        ("rows", rows, 1),
        ("columns", columns, 1),
        ("padding", padding, 0),
        ("scale", scale, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"argument {name!r}: expected an integer, got {value!r}")
        if value < least:
            raise ValueError(f"argument {name!r}: expected at least {least}, got {value}")
    images = list(images)
    if not 1 <= len(images) <= rows * columns:
        raise ValueError(
            f"argument 'images': expected 1 to {rows * columns} pictures for {rows} rows and "
            f"{columns} columns, got {len(images)}"
        )
    kinds = {(image.mode, image.size) for image in images}
    if len(kinds) > 1:
        raise ValueError(f"argument 'images': expected one mode and size, got {sorted(kinds)}")
    mode, (width, height) = kinds.pop()
    width, height = width * scale, height * scale
    sheet = Image.new(
        mode, (columns * (width + padding) + padding, rows * (height + padding) + padding)
    )
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        corner = (padding + column * (width + padding), padding + row * (height + padding))
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), corner)
    return sheet


def check_output_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder as a path, if files can be written there; before any work is spent.

    Raises:
        OSError: naming the folder, where it is missing, no folder, or not writable.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"output folder {folder}: does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"output folder {folder}: is not a folder")
    try:
        # A file is tried: permission bits don't tell of read-only file systems, nor bind root.
        tempfile.TemporaryFile(dir=folder, prefix=".ecar-").close()
    except OSError as error:
        raise type(error)(f"output folder {folder}: not writable ({error.strerror})") from None
    return folder


def check_output_file(path: str | os.PathLike[str]) -> Path:
    """The path of a picture to write, if it can be; before any work is spent.

    Raises:
        OSError: naming the path or its folder, where it can't be written.
        ValueError: where the suffix names no format that Pillow writes.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"output file {path}: is a folder")
    _picture_format(path)
    check_output_folder(path.parent)
    return path


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture, whole or not at all; the suffix chooses the format.

    An existing file is replaced. Raises as ``check_output_file`` does.
    """
    path = check_output_file(path)
    with atomic_path(path) as temporary:
        image.save(temporary, format=_picture_format(path))
    return path


def _picture_format(path: Path) -> str:
    """Pillow's name of the format that the suffix stands for."""
    name = Image.registered_extensions().get(path.suffix.lower())
    if name not in Image.SAVE:
        raise ValueError(
            f"output file {path}: expected a picture's suffix such as .png, .jpg or .webp, got "
            f"{path.suffix or 'none'!r}"
        )
    return name

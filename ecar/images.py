"""Pictures from tensors (PIL, numpy, sheets, files that are whole or absent) and from files.

``read_image`` is the one place where a picture file is decoded.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ecar.files import atomic_path, check_output_folder, check_target

__all__ = [
    "BadImageError",
    "check_image",
    "check_output_file",
    "check_output_folder",
    "make_sheet",
    "parse_background",
    "read_image",
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
    images: Sequence[Image.Image],
    rows: int,
    columns: int,
    padding: int = 2,
    scale: int = 1,
    names: Sequence[str] | None = None,
) -> Image.Image:
    """Lay pictures of one size out on a dark grid, row by row.

    Args:
        images: at most ``rows * columns`` pictures of one size and mode; missing ones stay dark.
        padding: pixels around each picture.
        scale: whole factor by which each picture is enlarged, nearest neighbour.
        names: written to the left of the rows, one for each; long ones are cut short.

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
    if names is not None and len(names) != rows:
        raise ValueError(f"argument 'names': expected {rows}, one for each row, got {len(names)}")
    mode, (width, height) = kinds.pop()
    width, height = width * scale, height * scale
    margin, labels = (
        0,
        [name if len(name) <= _LONGEST else f"{name[:_LONGEST]}.." for name in names or ()],
    )
    if labels:
        font = ImageFont.load_default(min(max(height // 4, 9), 20))
        margin = round(max(font.getlength(label) for label in labels)) + 2 * _GAP
    sheet = Image.new(
        mode, (margin + columns * (width + padding) + padding, rows * (height + padding) + padding)
    )
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        corner = (margin + padding + column * (width + padding), padding + row * (height + padding))
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), corner)
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels):
        middle = padding + row * (height + padding) + height / 2
        draw.text((margin - _GAP, middle), label, fill="white", font=font, anchor="rm")
    return sheet


def check_output_file(path: str | os.PathLike[str]) -> Path:
    """The path of a picture to write, if it can be; before any work is spent.

    Raises:
        OSError: naming the path or its folder, where it can't be written.
        ValueError: where the suffix names no format that Pillow writes.
    """
    path = Path(path)
    _picture_format(path)
    check_output_folder(path.parent)
    return check_target(path)


def save_image(
    image: Image.Image, path: str | os.PathLike[str], text: dict[str, str] | None = None
) -> Path:
    """Write a picture, whole or not at all; the suffix chooses the format.

    An existing file is replaced. ``text`` is kept in a PNG's text chunks, and left out of other
    formats; its keys are Latin-1, of 1 to 79 characters. Raises as ``check_output_file`` does.
    """
    path = Path(path)
    kind = _picture_format(path)
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    with atomic_path(path) as temporary:
        image.save(temporary, format=kind, pnginfo=chunks)
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


_GAP = 4  # pixels around the names of a sheet's rows
_LONGEST = 24  # letters of such a name
_LISTED = 10  # bad files that a message names
# By EXIF's number, how a stored picture is turned into the one that viewers show.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _BITS, _SAMPLE_FORMAT = 0x0112, 258, 339  # tags of EXIF and TIFF
_SIGNED = 2  # a sample format
_FLOAT_TOLERANCE = 1e-2  # resampled pictures overshoot a little


class BadImageError(OSError, ValueError):
    """Files that are no readable pictures.

    Attributes:
        files: each bad file's path and what is wrong with it.
    """

    def __init__(
        self, files: Sequence[tuple[str, str]], *, folder: str = "", total: int = 1, hint: str = ""
    ) -> None:
        self.files = list(files)
        if total == 1 or len(files) == 1:
            message = "; ".join(f"{path}: not a readable image ({why})" for path, why in files)
        else:
            listed = "; ".join(
                f"{os.path.relpath(path, folder)} ({why})" for path, why in files[:_LISTED]
            )
            more = len(files) - _LISTED
            message = f"{folder}: {len(files):,} of {total:,} files are not readable images: "
            message += listed + (f"; and {more:,} more" if more > 0 else "")
        super().__init__(message + (f"; {hint}" if hint else ""))

    def __reduce__(self) -> Any:
        return _bad_images, (self.files, str(self))


def _bad_images(files: list[tuple[str, str]], message: str) -> BadImageError:
    """One of a pickle: its message is made already."""
    error = BadImageError(files)
    error.args = (message,)
    return error


def read_image(
    path: str | os.PathLike[str],
    channels: int = 3,
    *,
    background: str | tuple[int, int, int] = "white",
    data: bytes | None = None,
) -> Image.Image:
    """A picture file as 8-bit grey (``channels`` 1, mode L) or RGB (3), as a viewer shows it.

    Turned as its EXIF says. What is transparent lies on ``background``. Integers of 16 bits are
    scaled from 0 .. 65535 (of signed 16 bits from 0 .. 32767), floats from 0 .. 1. Of several
    frames the first. Colour profiles are not applied. With ``data``, the file's bytes, nothing is
    opened, and ``path`` names it in errors.

    Raises:
        BadImageError: an OSError and a ValueError; naming the file: unreadable, or of other values.
    """
    colour = parse_background(background)
    try:
        with _opened(path) if data is None else Image.open(io.BytesIO(data)) as image:
            return _as_8_bits(image, channels, colour)
    except Exception as error:  # Pillow raises a dozen classes for files that are damaged
        why = "the file is empty" if data == b"" else _reason(path, error)
        raise BadImageError([(os.fspath(path), why)]) from error


def check_image(path: str | os.PathLike[str], *, decode: bool) -> str | None:
    """What is wrong with a picture file, if anything; what ``read_image`` would refuse.

    Without ``decode`` its header is read, and its end: a file is decoded only if it seems cut short
    or if its values may lie outside of their range.
    """
    try:
        with _opened(path) as image:
            wide = image.mode == "F" or image.mode.startswith("I")
            if decode or wide or not _seems_whole(path, image.format):
                _as_8_bits(image, 3, (255, 255, 255))
    except Exception as error:
        return _reason(path, error)
    return None


def parse_background(value: str | tuple[int, int, int]) -> tuple[int, int, int]:
    """ "white", "#7f7f7f" or (127, 127, 127) -> (r, g, b).

    Raises:
        ValueError: it is no opaque colour.
    """
    colour: object = value
    if isinstance(value, str):
        try:
            colour = ImageColor.getrgb(value)
        except ValueError:
            colour = None
    if (
        not isinstance(colour, (tuple, list))
        or len(colour) != 3
        or not all(isinstance(part, int) and 0 <= part <= 255 for part in colour)
    ):
        raise ValueError(
            "argument 'background': expected a colour such as white, black or #7f7f7f, got "
            f"{value!r}"
        )
    return colour[0], colour[1], colour[2]


def _as_8_bits(image: Image.Image, channels: int, background: tuple[int, int, int]) -> Image.Image:
    key = _transparent_key(image)
    if key is not None:
        image.info["transparency"] = key
    image.load()
    turn = _TURNS.get(_orientation(image))  # after loading, which turns a TIFF by itself
    alpha = None
    if image.mode == "F" or image.mode.startswith("I"):
        image, alpha = _scaled(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    if alpha is not None:
        below = Image.new("RGB", image.size, background)
        below.paste(image, mask=alpha)
        image = below
    image = image.convert("L" if channels == 1 else "RGB")
    return image if turn is None else image.transpose(turn)


def _transparent_key(image: Image.Image) -> int | tuple[int, ...] | None:
    """The colour that a PNG calls transparent, in the units of its decoded pixels."""
    key = image.info.get("transparency")
    tile = getattr(image, "tile", None)  # of images that come from a file
    raw = tile[0][3] if image.format == "PNG" and tile else None
    if isinstance(key, int) and raw in ("L;2", "L;4"):
        return key * 255 // (3 if raw == "L;2" else 15)
    if isinstance(key, tuple) and raw == "RGB;16B":
        return tuple(part >> 8 for part in key)
    return None


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF; the picture itself may be well
        return None


def _scaled(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Wide integers or floats as 8-bit grey, and what of it is opaque."""
    values = np.asarray(image)
    low, high = (values.min().item(), values.max().item()) if values.size else (0, 0)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise ValueError("holds NaN or infinite values")
        if low < -_FLOAT_TOLERANCE or high > 1 + _FLOAT_TOLERANCE:
            raise ValueError(f"holds floats from {low:.4g} to {high:.4g}, expected 0 to 1")
        levels = np.rint(values.clip(0, 1) * 255)
    else:
        tags = getattr(image, "tag_v2", {})
        kind = (*tags.get(_BITS, (16,))[:1], *tags.get(_SAMPLE_FORMAT, (1,))[:1])
        most = {(12, 1): 4095, (16, _SIGNED): 32767}.get(kind, 65535)
        if low < 0 or high > most:
            raise ValueError(f"holds integers from {low} to {high}, expected 0 to {most}")
        levels = np.rint(values.astype(np.float64) * (255 / most))
    key = image.info.get("transparency")
    alpha = None
    if isinstance(key, int):
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.fromarray(levels.astype(np.uint8)), alpha


def _seems_whole(path: str | os.PathLike[str], kind: str | None) -> bool:
    """Whether a file ends as its format ends; False where that can't be told."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
        file.seek(max(0, size - 64))
        tail = file.read()
    if kind in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail
    if kind == "PNG":
        return b"IEND\xaeB`\x82" in tail
    if kind == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return False


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Only a file is opened: a pipe of that name would never answer."""
    if os.path.islink(path) and not os.path.exists(path):
        raise OSError("a broken link")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a file")
    # By its handle: of a name, Pillow maps the file, and confuses the sides of a turned TIFF.
    with open(path, "rb") as file, Image.open(file) as image:
        yield image


def _reason(path: str | os.PathLike[str], error: Exception) -> str:
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "of no known format"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split())[:120]

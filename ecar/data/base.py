"""What every data set offers, and the kind that fits in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from ecar.codec import RANGE_TOLERANCE
from ecar.images import BadImageError

_LOOKED_AT = 64  # items of a data set that computes them


class MissingSplitError(FileNotFoundError, ValueError):
    """The data set has no such split."""


class ImageDataset(Dataset):
    """Images (or latents) with class labels, indexed 0 .. len - 1.

    ``dataset[i]`` is (float32 tensor [C, H, W], int label); images lie in [-1, 1].

    Attributes:
        name: as given to ``load_dataset``.
        split: "train" or "test".
        shape: (C, H, W) of every item.
        class_names: label k is ``class_names[k]``.
    """

    def __init__(
        self, name: str, split: str, shape: Sequence[int], class_names: Sequence[str]
    ) -> None:
        self.name = name
        self.split = split
        self.shape = tuple(shape)
        self.class_names = tuple(class_names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def labels(self) -> Tensor:
        """All labels, int64 [N]."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise NotImplementedError

    def _row(self, index: int) -> int:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for a data set of {len(self)}")
        return index % len(self)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All items at once: (float32 [N, C, H, W], int64 labels [N])."""
        images = torch.empty(len(self), *self.shape)
        for i in range(len(self)):
            images[i] = self[i][0]
        return images, self.labels.clone()

    def __repr__(self) -> str:
        kind = f"{type(self).__name__}({self.name!r}, split={self.split!r})"
        return f"{kind}: {len(self):,} x {list(self.shape)}, {self.num_classes} classes"


class InMemoryDataset(ImageDataset):
    """Pixels kept as small integers; [-1, 1] is computed on access.

    Args:
        pixels: uint8 [N, C, H, W] with values 0 .. maximum.
        labels: [N], whole numbers from 0 to len(class_names) - 1.
        maximum: the pixel value that becomes 1 (0 becomes -1).

    Raises:
        TypeError, ValueError: naming the argument, and what came.
    """

    def __init__(
        self,
        name: str,
        split: str,
        pixels: Tensor,
        labels: Tensor,
        class_names: Sequence[str],
        *,
        maximum: int = 255,
    ) -> None:
        kinds = (torch.uint8, torch.int16, torch.int32, torch.int64)
        if not isinstance(pixels, Tensor) or pixels.dtype not in kinds or pixels.dim() != 4:
            raise TypeError(
                f"argument 'pixels': expected uint8 [N, C, H, W], got {describe(pixels)}"
            )
        if pixels.numel() and not 0 <= pixels.min() <= pixels.max() <= maximum:
            raise ValueError(
                f"argument 'pixels': expected values from 0 to {maximum}, got {describe(pixels)}"
            )
        super().__init__(name, split, pixels.shape[1:], class_names)
        self._pixels = pixels
        self._labels = checked_labels(labels, self.num_classes, whole_floats=True)
        if len(pixels) != len(self._labels):
            raise ValueError(
                f"argument 'labels': expected {len(pixels)}, one for each image, got "
                f"{len(self._labels)}"
            )
        self._half = maximum / 2

    @property
    def labels(self) -> Tensor:
        return self._labels

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self._row(index)
        return self._pixels[row] / self._half - 1, int(self._labels[row])

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self._pixels / self._half - 1, self._labels.clone()

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Some items: (float32 [B, C, H, W], int64 labels [B]) for rows int64 [B]."""
        return self._pixels[rows] / self._half - 1, self._labels[rows]


def describe(values: Any) -> str:
    """ "torch.float32 [4, 3, 8, 8] from 0 to 255", for messages."""
    if not isinstance(values, Tensor):
        return f"{type(values).__name__} {values!r}"[:80]
    text = f"{values.dtype} {list(values.shape)}"
    if values.numel() and not values.is_complex():
        low, high = (value.item() for value in values.double().aminmax())
        text += f" from {low:.4g} to {high:.4g}"
    return text


def checked_labels(
    labels: Any,
    num_classes: int,
    *,
    name: str = "labels",
    items: Sequence[int] | None = None,
    whole_floats: bool = False,
) -> Tensor:
    """Labels as int64 [N], if they are classes from 0 to num_classes - 1.

    Args:
        name: the argument that messages name.
        items: whose labels they are, for messages.
        whole_floats: take floats that are whole numbers, as text files hold them.

    Raises:
        TypeError: no integers. ValueError: another shape, or out of range.
    """
    if not isinstance(labels, Tensor):
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"argument {name!r}: expected integer labels, got {describe(labels)}"
            ) from None
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if whole_floats and labels.is_floating_point():
        integers = bool((labels == labels.round()).all())
    if not integers:
        raise TypeError(f"argument {name!r}: expected integer labels, got {describe(labels)}")
    if labels.dim() != 1:
        raise ValueError(f"argument {name!r}: expected labels [N], got {describe(labels)}")
    if not labels.is_floating_point():
        labels = labels.to(torch.int64)
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"argument {name!r}: expected labels from 0 to {num_classes - 1}, got "
            f"{labels[row].item():g}" + (f" (item {items[row]})" if items else "")
        )
    return labels.to(torch.int64)


def checked_images(images: Any, shape: Sequence[int], *, name: str, pixels: bool) -> Tensor:
    """Items [N, C, H, W] of a data set as float32, if they are what is documented.

    Args:
        shape: [C, H, W].
        name: the argument that messages name.
        pixels: pictures, in [-1, 1]; latents are finite, and no more.

    Raises:
        TypeError: no floats. ValueError: another shape, NaN or infinity, another range.

    Warns:
        UserWarning: pictures of which no value is below 0, which may be bright or in [0, 1].
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(
            f"argument {name!r}: expected floating-point items in [-1, 1], got {describe(images)}"
        )
    if tuple(images.shape[1:]) != tuple(shape):
        raise ValueError(
            f"argument {name!r}: expected items of shape {list(shape)} for this model, got "
            f"{list(images.shape[1:])}"
        )
    images = images.float()
    if not images.isfinite().all():
        raise ValueError(f"argument {name!r}: items hold NaN or infinity")
    if pixels and images.numel():
        low, high = (value.item() for value in images.aminmax())
        # A black pixel at 0, and nothing below it.
        unit = 0 <= low < 1e-3 and low < high <= 1 + RANGE_TOLERANCE
        if unit or not -1 - RANGE_TOLERANCE <= low <= high <= 1 + RANGE_TOLERANCE:
            raise ValueError(
                f"argument {name!r}: expected images in [-1, 1], got values from {low:.4g} to "
                f"{high:.4g}" + ("; images in [0, 1] are given as 2 x - 1" if unit else "")
            )
        if 0 <= low < high:
            warnings.warn(
                f"argument {name!r}: no value of the images is below 0 (they are from {low:.4g} to "
                f"{high:.4g}); if they are in [0, 1], give 2 x - 1",
                stacklevel=2,
            )
    return images


def load_batches(
    dataset: Dataset, rows: Iterable[Sequence[int]], *, workers: int, pin_memory: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of each list of rows, read by so many processes, or by this one if 0.

    The processes are there when this returns.

    Raises:
        OSError: while it is iterated, as the data set raised it, in whichever process.
    """
    loader = DataLoader(
        _Fetched(dataset),
        batch_sampler=rows,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
    )
    return map(_or_raise, iter(loader))


class _Fetched(Dataset):
    """A data set, batch by batch. What says that a file can't be read takes the batch's place: a
    DataLoader would raise it with a worker's traceback in its message."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, rows: Sequence[int]) -> Any:
        try:
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(rows)
            return [self.dataset[row] for row in rows]
        except OSError as error:
            # Those that are known to be the same after a pickle.
            if type(error) is BadImageError or type(error).__module__ == "builtins":
                return error
            raise


def _collate(items: Any) -> Any:
    return items if isinstance(items, OSError) else default_collate(items)


def _or_raise(batch: Any) -> Any:
    if isinstance(batch, OSError):
        raise batch
    return batch


def check_dataset(
    dataset: Dataset, shape: Sequence[int], num_classes: int, *, name: str, pixels: bool
) -> Tensor | None:
    """Look at a data set before anything is spent on it: types, shapes, labels, values.

    Of a `TensorDataset` all items are looked at; of an `ImageDataset` all labels; of what any other
    data set computes, items spread over it.

    Args:
        shape: [C, H, W] of every item.
        name: the argument that messages name.
        pixels: items are pictures, in [-1, 1].

    Returns: all labels, where the data set has them at hand.
    Raises:
        TypeError, ValueError: naming the argument, and what came.
    """
    length = len(cast("Sized", dataset))
    if not length:
        raise ValueError(f"argument {name!r}: expected at least one image, got none")
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        images, labels = dataset.tensors
        checked_images(images, shape, name=name, pixels=pixels)
        return checked_labels(labels, num_classes, name=name, items=range(length))
    known = None
    if isinstance(dataset, ImageDataset):
        known = checked_labels(dataset.labels, num_classes, name=name, items=range(length))
        if isinstance(dataset, InMemoryDataset):
            checked_images(dataset[0][0][None], shape, name=name, pixels=False)
            return known
    rows = torch.linspace(0, length - 1, min(length, _LOOKED_AT)).round().long().tolist()
    items = [dataset[row] for row in rows]
    for item in items:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise TypeError(
                f"argument {name!r}: expected items (image, label), got {describe(item)}"
            )
    pictures = [torch.as_tensor(image) for image, _ in items]
    for image in pictures:  # one by one, for a message that names the odd one's shape
        checked_images(image[None], shape, name=name, pixels=False)
    checked_images(torch.stack([i.float() for i in pictures]), shape, name=name, pixels=pixels)
    for row, (_, label) in zip(rows, items, strict=True):
        batch = label[None] if isinstance(label, Tensor) else [label]
        checked_labels(batch, num_classes, name=name, items=[row])
    return known

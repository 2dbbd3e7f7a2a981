"""What every data set offers, and the kind that fits in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset


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
        labels: integer [N].
        maximum: the pixel value that becomes 1 (0 becomes -1).
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
        super().__init__(name, split, pixels.shape[1:], class_names)
        self._pixels = pixels
        self._labels = labels.to(torch.int64)
        self._half = maximum / 2

    @property
    def labels(self) -> Tensor:
        return self._labels

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self._row(index)
        return self._pixels[row] / self._half - 1, int(self._labels[row])

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self._pixels / self._half - 1, self._labels.clone()

"""Samples in the format of ADM's evaluator."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from torch import Tensor

from ecar.files import atomic_path

__all__ = ["save_npz"]


def save_npz(
    path: str | os.PathLike[str], images: Tensor | np.ndarray, labels: Tensor | np.ndarray | None
) -> Path:
    """Write arr_0 = images uint8 [N, H, W, 3] and arr_1 = labels int64 [N], whole or not at all.

    Args:
        path: a name that ends in .npz.
        images: uint8 [N, H, W, 3] or [N, H, W, 1]; grey is repeated to three channels.
        labels: integers [N], or None to leave them out.

    Raises:
        TypeError, ValueError: naming the argument. OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"argument 'path': expected a name that ends in .npz, got {path}")
    images = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if images.dtype != np.uint8:
        raise TypeError(f"argument 'images': expected uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"argument 'images': expected [N, H, W, 3] or [N, H, W, 1], got {list(images.shape)}"
        )
    arrays = [np.broadcast_to(images, (*images.shape[:3], 3))]
    if labels is not None:
        labels = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(f"argument 'labels': expected integers, got {labels.dtype}")
        if labels.shape != (len(images),):
            raise ValueError(
                f"argument 'labels': expected [{len(images)}], got {list(labels.shape)}"
            )
        arrays.append(labels.astype(np.int64))
    with atomic_path(path) as temporary:
        np.savez(temporary, *arrays)
    return path

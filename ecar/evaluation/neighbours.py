"""Memorising: how near samples come to training pictures, and held-out pictures likewise.

A model that copies draws samples nearer to a training picture than any new picture of the same
kind is. The held-out pictures say how near that is.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ecar.data import ImageDataset
from ecar.images import make_sheet, save_image, to_pil

from .extractors import to_bytes

__all__ = ["memorising", "nearest_training", "neighbour_sheet"]

_SIDE = 32  # larger images are averaged down to at most this before they are compared
_BLOCK = 1000  # training images compared at a time
_ROWS, _COLUMNS = 6, 12  # of a sheet, each row twice


def nearest_training(
    images: Tensor, train: ImageDataset, *, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """The training picture nearest to each image, and how far away it is.

    Args:
        images: uint8 [N, C, H, W] as the data set's.

    Returns: (index into ``train``, int64 [N]; root mean square of the difference over channels and
        pixels, in 255ths, float64 [N]). Images of more than 32 pixels a side are averaged down.
    Raises:
        ValueError: other images.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        came = f"{images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"argument 'images': expected uint8 [N, C, H, W], got {came}")
    if tuple(images.shape[1:]) != train.shape:
        raise ValueError(
            f"argument 'images': expected {['N', *train.shape]} as the data set's, got "
            f"{list(images.shape)}"
        )
    points = _points(images)
    best = torch.full((len(images),), torch.inf)
    index = torch.zeros(len(images), dtype=torch.int64)
    nearest = torch.zeros_like(points)
    starts = range(0, len(train), _BLOCK)
    for start in tqdm(starts, "nearest training images", disable=not progress):
        rows = range(start, min(start + _BLOCK, len(train)))
        block = _points(torch.stack([to_bytes(train[row][0]) for row in rows]))
        # |a - b|^2 without |a|^2: which one is the least does not depend on it.
        least, place = (block.square().sum(1) - 2 * points @ block.T).min(1)
        nearer = least < best
        best = torch.where(nearer, least, best)
        index = torch.where(nearer, place + start, index)
        nearest[nearer] = block[place[nearer]]
    # The expanded square's rounding would hide that a copy is exact.
    return index, (points.double() - nearest.double()).square().mean(1).sqrt()


def memorising(
    images: Tensor, held_out: Tensor, train: ImageDataset, *, progress: bool = False
) -> tuple[dict[str, Any], Tensor]:
    """How far generated and held-out images are from the training set.

    Args:
        images, held_out: uint8 [N, C, H, W] and [M, C, H, W].

    Returns: (a part of a report, the index of each image's nearest training picture). In it are
        quantiles of the distances of both, and the share of generated images that are nearer to a
        training picture than 95 % of the held-out ones: of a model that draws new pictures as a
        new draughtsman would it is 0.05.
    """
    index, generated = nearest_training(images, train, progress=progress)
    _, real = nearest_training(held_out, train, progress=progress)
    quantiles = (0.0, 0.05, 0.5, 0.95)
    parts = {}
    for name, distances in (("generated", generated), ("held_out", real)):
        values = torch.quantile(distances, torch.tensor(quantiles, dtype=torch.float64)).tolist()
        keys = ("least", "5 %", "median", "95 %")
        parts[name] = {key: round(value, 3) for key, value in zip(keys, values, strict=True)}
    nearer = (generated < torch.quantile(real, 0.05)).double().mean().item()
    return {
        "distance": "to the nearest of all training images: root mean square over pixels, in "
        f"255ths, at {min(train.shape[1], _SIDE)} x {min(train.shape[2], _SIDE)} pixels",
        **parts,
        "nearer_than_95 %_of_held_out": nearer,
    }, index


def neighbour_sheet(
    path: str | os.PathLike[str], images: Tensor, index: Tensor, train: ImageDataset
) -> None:
    """Write a sheet of the first images, below each the training picture at its index.

    Args:
        images, index: as of `nearest_training`.
    """
    count = min(len(images), _ROWS * _COLUMNS)
    rows = -(-count // _COLUMNS)
    shown = images[:count].float() / 127.5 - 1
    nearest = torch.stack([train[int(row)][0] for row in index[:count]])
    pictures, twins = to_pil(shown), to_pil(nearest)
    lines = []
    for row in range(rows):
        part = slice(row * _COLUMNS, (row + 1) * _COLUMNS)
        lines += pictures[part] + twins[part]
    columns = min(count, _COLUMNS)
    scale = max(1, 64 // pictures[0].width)
    save_image(make_sheet(lines, 2 * rows, columns, scale=scale), path)


def _points(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] -> float32 [N, values], small numbers around 0."""
    values = images.float() - 128
    factor = -(-max(values.shape[-2:]) // _SIDE)
    return (F.avg_pool2d(values, factor) if factor > 1 else values).flatten(1)

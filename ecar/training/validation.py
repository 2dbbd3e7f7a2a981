"""The loss on held-out images: always the same ones, with the same noise and times."""

from __future__ import annotations

import statistics
from collections.abc import Sized
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ecar.data.base import checked_labels
from ecar.model import ECAR
from ecar.training.batches import draw
from ecar.training.config import TrainConfig

__all__ = ["Validation"]

_STEP = 2**63  # whose random numbers no training reaches
_CHUNK = 64  # images at once


class Validation:
    """Measures a model's stage losses on held-out images, without label dropout.

    Args:
        dataset: of (float32 [C, H, W], int label); ``config.validation_images`` of them, spread
            over it, are read and kept.

    Raises:
        TypeError, ValueError: for labels that are no classes.
    """

    def __init__(self, dataset: Dataset, config: TrainConfig) -> None:
        length = len(cast("Sized", dataset))
        count = min(config.validation_images, length)
        rows = torch.linspace(0, length - 1, count).round().long().tolist()
        items = [dataset[row] for row in rows]
        self.latents = torch.stack([torch.as_tensor(latents).float() for latents, _ in items])
        labels = [int(label) for _, label in items]
        self.labels = checked_labels(labels, config.model.num_classes, name="held_out")
        self.seed = config.seed

    def __len__(self) -> int:
        return len(self.labels)

    def row(self, averages: dict[str, ECAR]) -> dict[str, float]:
        """The row of validation.csv: the first model's ``loss_1`` .. ``loss_S`` and their mean
        ``loss``; by its name, that mean of each further one."""
        (_, first), *others = averages.items()
        losses = self.losses(first)
        row = {f"loss_{stage}": loss for stage, loss in enumerate(losses, start=1)}
        row["loss"] = statistics.fmean(losses)
        return row | {name: statistics.fmean(self.losses(model)) for name, model in others}

    @torch.no_grad()
    def losses(self, model: ECAR) -> list[float]:
        """The mean loss of each stage, in the model's dtype, on its device."""
        shape, stages = model.config.latent_shape, model.config.num_stages
        total = torch.zeros(stages, dtype=torch.float64)
        for begin in range(0, len(self), _CHUNK):
            rows = range(begin, min(begin + _CHUNK, len(self)))
            draws = draw(self.seed, _STEP, rows, shape, stages)
            part = slice(rows.start, rows.stop)
            arguments: tuple[Tensor, ...] = (
                self.latents[part], self.labels[part], draws.noise, draws.tau,
            )  # fmt: skip
            losses = model(*(tensor.to(model.device) for tensor in arguments))
            total += losses.double().cpu() * len(rows)
        return (total / len(self)).tolist()

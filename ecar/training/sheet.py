"""Sample sheets during training: a row per class, a column per seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ecar.images import make_sheet, save_image, to_pil
from ecar.model import ECAR
from ecar.sampling import sample
from ecar.training.config import TrainConfig

__all__ = ["write_sheet"]

_CHUNK = 64  # images sampled at once


def write_sheet(
    model: ECAR,
    config: TrainConfig,
    path: Path,
    decode: Callable[[Tensor], Tensor] | None,
    class_names: Sequence[str] | None = None,
) -> Image.Image:
    """Sample a sheet, write it as a PNG, and return it.

    Args:
        model: the averaged weights.
        decode: latents [B, C, H, W] -> images in [-1, 1]; None where latents are pixels.
        class_names: of all classes, for the rows.
    """
    classes = config.model.num_classes
    rows, columns = min(config.sample_rows, classes), config.sample_columns
    chosen = torch.linspace(0, classes - 1, rows).round().long()
    labels = chosen.repeat_interleave(columns).to(model.device)
    seeds = torch.arange(columns).repeat(rows).to(model.device)
    pictures = []
    for begin in range(0, len(labels), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        latents = sample(
            model,
            labels[part],
            seeds=seeds[part],
            steps=config.sample_steps,
            guidance_scale=config.sample_guidance,
            graphs=False,  # they would hold memory that training needs
        ).latents
        pictures += to_pil(latents if decode is None else decode(latents))
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = max(1, 32 // pictures[0].width)
    names = None if class_names is None else [class_names[label] for label in chosen.tolist()]
    sheet = make_sheet(pictures, rows, columns, scale=scale, names=names)
    save_image(sheet, path)
    return sheet

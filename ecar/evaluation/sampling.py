"""Samples to measure: which classes, which seeds, in batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecar.data import ImageDataset
from ecar.inputs import draw_seeds
from ecar.model import ECAR
from ecar.pipeline import ECARPipeline

from .extractors import to_bytes

__all__ = ["as_pipeline", "draw_labels", "generate", "image_seeds", "order", "require_positive"]


def draw_labels(train: ImageDataset, count: int, *, seed: int = 0) -> Tensor:
    """Classes to ask for, int64 [count]: labels of the training set in a random order, repeated if
    they do not suffice. So the samples have the class frequencies of the real ones."""
    rows = order(len(train), seed)
    return train.labels[rows.repeat(-(-count // len(rows)))[:count]]


def order(count: int, seed: int) -> Tensor:
    """A random order of ``count`` things, int64."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def generate(
    source: ECARPipeline | ECAR,
    labels: Tensor,
    seeds: Tensor,
    *,
    batch_size: int = 100,
    progress: bool = True,
    **settings: Any,
) -> Tensor:
    """Sample uint8 images [N, C, H, W], one for each class and seed, in batches.

    Args:
        source: a pipeline, or a model whose latents are pixels.
        labels, seeds: int64 [N].
        settings: of the pipeline's call: num_inference_steps, guidance_scale, guidance_schedule,
            guidance_interval, solver, grid. What is left out is the pipeline's default.
    """
    require_positive("batch_size", batch_size)
    if labels.shape != seeds.shape or labels.dim() != 1 or len(labels) == 0:
        raise ValueError(
            "argument 'seeds': expected [N] as the labels and N > 0, got "
            f"{list(seeds.shape)} for labels {list(labels.shape)}"
        )
    batches = []
    with (
        as_pipeline(source) as pipeline,
        tqdm(
            total=len(labels), desc="sampling", unit="image", miniters=0, disable=not progress
        ) as bar,
    ):

        def show(_: ECARPipeline, step: int, *__: Any) -> None:
            bar.set_postfix_str(f"step {step + 1} of a batch", refresh=False)
            bar.update(0)

        for rows in torch.arange(len(labels)).split(batch_size):
            images = pipeline(
                labels[rows],
                seeds=seeds[rows],
                output_type="pt",
                progress=False,
                callback_on_step_end=show,
                **settings,
            ).images
            batches.append(to_bytes(images * 2 - 1).cpu())
            bar.update(len(rows))
    return torch.cat(batches)


@contextlib.contextmanager
def as_pipeline(source: ECARPipeline | ECAR) -> Iterator[ECARPipeline]:
    """A pipeline around a model, which goes back to training afterwards if it was."""
    if not isinstance(source, (ECARPipeline, ECAR)):
        raise TypeError(
            f"argument 'source': expected an ECARPipeline or an ECAR, got {type(source).__name__}"
        )
    trained = source if isinstance(source, ECAR) and source.training else None
    try:
        yield ECARPipeline(source) if isinstance(source, ECAR) else source
    finally:
        if trained is not None:
            trained.train()


def image_seeds(first_seed: int, count: int) -> Tensor:
    """So many seeds from the first on, int64; TypeError or ValueError where they are none."""
    (first,) = draw_seeds([first_seed], None, 1, name="first_seed")
    draw_seeds([first + count - 1], None, 1, name="first_seed")
    return first + torch.arange(count)


def require_positive(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"argument {name!r}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"argument {name!r}: expected at least {least}, got {value}")

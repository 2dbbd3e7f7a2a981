"""Batches and their random draws, as pure functions of (seed, step, image of the global batch).

So one process and many see the same global batch and the same noise, and a resumed training
needs no more than the step it stopped at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ecar.data import InMemoryDataset
from ecar.data.base import checked_labels, load_batches

__all__ = ["Batch", "Batches", "Draws", "draw"]

# Which stream of numbers a key is for: two streams never share one.
_ROWS, _ORDER = 0, 1


@dataclass(frozen=True)
class Draws:
    """The random numbers of some rows of one step's global batch, all float32 on the CPU."""

    noise: Tensor  # [B, C, H, W], standard normal
    tau: Tensor  # [B, S], uniform in [0, 1)
    dropout: Tensor  # [B], uniform: the label is dropped below the dropout's share
    flip: Tensor  # [B], uniform: the image is mirrored below 1/2


@dataclass(frozen=True)
class Batch:
    """The rows of one backward pass, as the model takes them."""

    latents: Tensor
    labels: Tensor
    noise: Tensor
    tau: Tensor

    def to(self, device: torch.device) -> Batch:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(*map(move, (self.latents, self.labels, self.noise, self.tau)))


class _Stream:
    """numpy's Philox4x64 at key (seed, stream), to be placed at any counter.

    Placing one generator anew costs a tenth of making one.
    """

    def __init__(self, seed: int, stream: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))
        self._state = self._bits.state  # of a generator that has drawn nothing
        self._generator = np.random.Generator(self._bits)

    def at(self, high: int, low: int) -> np.random.Generator:
        """The generator at the counter whose two high words are these."""
        self._state["state"]["counter"][:] = (0, 0, low, high)
        self._bits.state = self._state
        return self._generator


def draw(seed: int, step: int, rows: range, shape: Sequence[int], stages: int) -> Draws:
    """The numbers of these rows of step ``step``'s global batch; each row has its own counters.

    Args:
        seed: in [0, 2^63).
        rows: of the global batch.
        shape: [C, H, W].
        stages: S.
    """
    noise = np.empty((len(rows), *shape), dtype=np.float32)
    uniform = np.empty((len(rows), stages + 2), dtype=np.float32)
    stream = _Stream(seed, _ROWS)
    for place, row in enumerate(rows):
        generator = stream.at(step, row)
        generator.random(out=uniform[place], dtype=np.float32)
        generator.standard_normal(out=noise[place], dtype=np.float32)
    numbers = torch.from_numpy(uniform)
    return Draws(torch.from_numpy(noise), numbers[:, 2:].contiguous(), numbers[:, 0], numbers[:, 1])


class Order:
    """The infinite stream of data indices: one permutation per epoch, from (seed, epoch)."""

    def __init__(self, seed: int, length: int) -> None:
        self.seed = seed
        self.length = length
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def indices(self, begin: int, end: int) -> np.ndarray:
        """Positions ``begin`` to ``end`` of the stream, int64."""
        parts = []
        while begin < end:
            epoch, offset = divmod(begin, self.length)
            if epoch != self._epoch:
                self._permutation = _Stream(self.seed, _ORDER).at(epoch, 0).permutation(self.length)
                self._epoch = epoch
            part = self._permutation[offset : offset + end - begin]
            parts.append(part)
            begin += len(part)
        return np.concatenate(parts)


class _Rows(Sampler[list[int]]):
    """A loader's index lists: this rank's rows of each step from ``begin`` on."""

    def __init__(self, batches: Batches, begin: int, end: int) -> None:
        self.batches, self.begin, self.end = batches, begin, end

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.begin, self.end):
            yield self.batches.row_indices(step).tolist()


class Batches:
    """This rank's share of every global batch.

    Rank r of W takes rows [r B/W, (r+1) B/W) of the global batch of B, and splits them into
    ``accumulation`` equal parts, in order.

    Args:
        dataset: map-style, of (float32 [C, H, W], int label); one in memory is indexed directly.
        label_dropout: share of the labels replaced by ``null_class``, the number of classes.
        tau: distribution of the times, "uniform" or "logit-normal".
        workers: loader processes, for a dataset that is not in memory.

    Raises:
        ValueError: if the batch does not divide equally.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        batch_size: int,
        accumulation: int,
        stages: int,
        shape: Sequence[int],
        label_dropout: float,
        null_class: int,
        flip: bool,
        workers: int,
        tau: str = "uniform",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % (world * accumulation):
            raise ValueError(
                f"argument 'batch_size': expected a multiple of {world} processes x "
                f"{accumulation} accumulation steps, got {batch_size}"
            )
        self.dataset = dataset
        self.seed, self.shape, self.stages = seed, tuple(shape), stages
        self.batch_size, self.accumulation = batch_size, accumulation
        self.label_dropout, self.null_class, self.flip = label_dropout, null_class, flip
        self.workers, self.tau = workers, tau
        share = batch_size // world
        self.rows = range(rank * share, (rank + 1) * share)
        self.order = Order(seed, len(cast("Sized", dataset)))

    def row_indices(self, step: int) -> np.ndarray:
        """Data indices of this rank's rows of ``step``, int64."""
        first = step * self.batch_size
        return self.order.indices(first + self.rows.start, first + self.rows.stop)

    def steps(self, begin: int, end: int) -> Iterator[list[Batch]]:
        """The parts of each step from ``begin`` to ``end``, excluded.

        Raises:
            TypeError, ValueError: for labels that are no classes.
        """
        for step, (latents, labels) in zip(range(begin, end), self._data(begin, end), strict=True):
            yield self._parts(step, latents, labels)

    def _data(self, begin: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        if not isinstance(self.dataset, InMemoryDataset):
            # The null class's number would be learnt as if it were a class.
            for latents, labels in load_batches(
                self.dataset,
                _Rows(self, begin, end),
                workers=self.workers,
                pin_memory=torch.cuda.is_available(),
            ):
                yield latents.float(), checked_labels(labels, self.null_class, name="dataset")
            return
        for step in range(begin, end):
            yield self.dataset.take(torch.from_numpy(self.row_indices(step)))

    def _parts(self, step: int, latents: Tensor, labels: Tensor) -> list[Batch]:
        draws = draw(self.seed, step, self.rows, self.shape, self.stages)
        if self.flip:
            mirrored = (draws.flip < 0.5)[:, None, None, None]
            latents = torch.where(mirrored, latents.flip(-1), latents)
        labels = labels.masked_fill(draws.dropout < self.label_dropout, self.null_class)
        tau = draws.tau
        if self.tau == "logit-normal":
            tau = torch.special.ndtri(tau).sigmoid()  # by the normal distribution's quantiles
        tensors = (latents, labels, draws.noise, tau)
        split = [tensor.chunk(self.accumulation) for tensor in tensors]
        return [Batch(*part) for part in zip(*split, strict=True)]

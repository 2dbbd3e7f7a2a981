"""Tiny trainings: a model of a few thousand weights on digits or random images."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from ecar.config import ECARConfig
from ecar.training import TrainConfig


@pytest.fixture
def tiny() -> ECARConfig:
    return ECARConfig.preset("digits", width=16, heads=2, ar_layers=2, flow_blocks=1)


@pytest.fixture
def make_config(tiny, tmp_path, seed):
    """A TrainConfig of a short training in ``tmp_path``; fields by name."""

    def make(**fields) -> TrainConfig:
        values = {
            "model": tiny,
            "output_dir": str(tmp_path / "run"),
            "steps": 4,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "log_every": 1,
            "sample_every": 0,
            "num_workers": 0,
            "seed": seed,
            "device": "cpu",
        }
        return TrainConfig(**{**values, **fields})

    return make


@pytest.fixture
def images(tiny, generator) -> TensorDataset:
    """20 random images with labels, not an in-memory data set: served by a loader."""
    return TensorDataset(
        torch.rand(20, *tiny.latent_shape, generator=generator) * 2 - 1,
        torch.randperm(20, generator=generator) % tiny.num_classes,
    )


@pytest.fixture
def read_log():
    """The rows of a training's log.csv, as a dict of columns."""

    def read(folder) -> dict[str, list[float]]:
        header, *rows = [
            line.split(",") for line in (Path(folder) / "log.csv").read_text().splitlines()
        ]
        columns = zip(*[[float(cell) for cell in row] for row in rows], strict=True)
        return dict(zip(header, map(list, columns), strict=True))

    return read

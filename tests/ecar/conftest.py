import contextlib
import resource
import signal

import pytest
import torch

from ecar.config import ECARConfig
from ecar.model import ECAR


def tiny_config(**changes):
    sizes = {
        "stage_sides": (4, 8),
        "channels": 1,
        "patch_size": 2,
        "num_classes": 10,
        "width": 32,
        "heads": 2,
        "ar_layers": 2,
        "flow_blocks": 2,
    }
    return ECARConfig(**{**sizes, **changes})


def tiny_model(**changes):
    """A small model whose zero-initialised weights are random too, so that all paths matter."""
    model = ECAR(tiny_config(**changes)).eval()
    with torch.no_grad():
        for head in model.heads:
            torch.nn.init.normal_(head.modulation.weight, std=0.1)
            torch.nn.init.normal_(head.output.weight, std=0.3)
    return model


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def make_model():
    return tiny_model


@contextlib.contextmanager
def full_disk():
    """No file may grow: what a disk without space does, for every library's way of writing."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

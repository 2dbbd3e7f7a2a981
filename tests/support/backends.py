"""The kernels' backends, for tests that hold for each of them."""

import importlib.util
from collections.abc import Callable

import pytest
import torch

from ecar_kernels import resolve
from tests.support.native import needs_native

# Where a backend's tests run. Triton's kernels are interpreted where there is no GPU.
DEVICES = {"cpp": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
KERNELS = (pytest.param("cpp", marks=needs_native), pytest.param("triton", marks=needs_triton))
by_every_kernel = pytest.mark.parametrize("backend", KERNELS)


def kernel(op: str, backend: str) -> Callable:
    return resolve(op, device=DEVICES[backend], dtype=torch.float32, backend=backend)


def on_gpu(call):
    return {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }

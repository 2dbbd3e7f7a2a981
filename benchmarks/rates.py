"""What this machine can do: copy, and multiply matrices. The floors are made of it."""

import itertools
import statistics
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from benchmarks import linears
from benchmarks.timing import interleave
from ecar_kernels.costs import Rates

COPY_BYTES = 64 * 2**20
GEMM_ROWS = (512, 2048)
GEMM_WIDTH = 1152  # of E-CAR-L; to four times this width and back, as its MLP has it


def measure(
    dtype: torch.dtype = torch.float32,
    *,
    seconds: float = 2.0,
    copy_bytes: int = COPY_BYTES,
    width: int = GEMM_WIDTH,
) -> tuple[Rates, dict[str, float]]:
    """The best rates found, and all that were tried: bytes and multiply-adds per second."""
    copies = _copies(copy_bytes, seconds / 2)
    gemms = _gemms(dtype, width, seconds / 2)
    return Rates(max(copies.values()), max(gemms.values())), copies | gemms


def _copies(size: int, seconds: float) -> dict[str, float]:
    """Torch's copy, and the C library's with one piece for each thread."""
    source = torch.randn(size // 4)
    target = torch.empty_like(source)
    threads = torch.get_num_threads()
    pieces = [
        (a.numpy(), b.numpy())
        for a, b in zip(target.chunk(threads), source.chunk(threads), strict=True)
    ]
    with ThreadPoolExecutor(threads) as pool:
        ways = {
            "copy: Tensor.copy_": lambda: target.copy_(source),
            "copy: memcpy on each thread": lambda: list(
                pool.map(lambda piece: np.copyto(*piece), pieces)
            ),
        }
        return _rates(ways, 2 * size, seconds)


def _gemms(dtype: torch.dtype, width: int, seconds: float) -> dict[str, float]:
    found = {}
    shapes = [(4 * width, width), (width, 4 * width)]
    for rows, (outputs, inputs) in itertools.product(GEMM_ROWS, shapes):
        weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
        x = torch.randn(1, rows, inputs).to(dtype)
        ways = {
            f"GEMM: {name}, {rows} x {inputs} x {outputs}": lambda path=path, x=x: path(x)
            for name, path in linears.fastest_alone(weight, bias, rows).items()
        }
        found |= _rates(ways, rows * weight.numel(), seconds / len(GEMM_ROWS) / len(shapes))
    return found


@torch.no_grad()
def _rates(ways: dict, amount: int, seconds: float) -> dict[str, float]:
    for call in ways.values():
        call()
    times = interleave({name: itertools.repeat(call) for name, call in ways.items()}, seconds)
    return {name: amount / statistics.median(values) for name, values in times.items()}

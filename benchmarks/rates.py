"""What this machine reaches: a copy, and a matrix product. Lower bounds are computed from both."""

import itertools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import interleave
from ecar_kernels import _native
from ecar_kernels.costs import Rates

COPY_BYTES = 64 * 2**20
GEMM_ROWS = (512, 2048)
GEMM_WIDTH = 1152  # of E-CAR-L; to four times this width and back, as in its MLP
Linear = Callable[[Tensor], Tensor]


def measure(
    dtype: torch.dtype = torch.float32,
    *,
    seconds: float = 2.0,
    copy_bytes: int = COPY_BYTES,
    width: int = GEMM_WIDTH,
) -> tuple[Rates, dict[str, float]]:
    """The best rates found, and all that were tried: bytes and multiply-adds per second."""
    source = torch.randn(copy_bytes // 4)
    target = torch.empty_like(source)
    copies = _rates({"copy": lambda: target.copy_(source)}, 2 * copy_bytes, seconds / 2)
    gemms = _gemms(dtype, width, seconds / 2)
    return Rates(copies["copy"], max(gemms.values())), copies | gemms


def _gemms(dtype: torch.dtype, width: int, seconds: float) -> dict[str, float]:
    found = {}
    shapes = [(4 * width, width), (width, 4 * width)]
    for rows, (outputs, inputs) in itertools.product(GEMM_ROWS, shapes):
        weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
        x = torch.randn(1, rows, inputs).to(dtype)
        ways = {
            f"GEMM: {name}, {rows} x {inputs} x {outputs}": lambda run=run, x=x: run(x)
            for name, run in linears(weight, bias, rows).items()
        }
        found |= _rates(ways, rows * weight.numel(), seconds / len(GEMM_ROWS) / len(shapes))
    return found


def linears(weight: Tensor, bias: Tensor, rows: int) -> dict[str, Linear]:
    """Ways to compute a linear layer alone, for x [1, rows, K]; weights are packed here."""
    found: dict[str, Linear] = {"nn.Linear": lambda x: F.linear(x, weight, bias)}
    onednn = torch.ops.mkldnn
    if torch.backends.mkldnn.is_available() and hasattr(onednn, "_reorder_linear_weight"):
        packed = onednn._reorder_linear_weight(weight, rows)
        found["oneDNN packed"] = lambda x: onednn._linear_pointwise(x, packed, bias, "none", [], "")
    if _native.why_not() is None:
        found["ecar_kernels packed"] = packed_linear(weight, bias, rows)
    return found


def packed_linear(weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
    """The flow block's GEMM with a neutral epilogue: a gate of one and a residual of zero."""
    from ecar_kernels.flow_block import packing

    run = torch.ops.ecar.packed_linear_gated_residual.default
    packed, outputs = packing.packed_weight(weight), weight.shape[0]
    gate = torch.ones(1, 1, outputs, dtype=weight.dtype)
    residual = torch.zeros(1, 1, outputs, dtype=weight.dtype).expand(1, rows, outputs)
    return lambda x: run(x, packed, bias, gate, residual, None)


@torch.no_grad()
def _rates(ways: dict, amount: int, seconds: float) -> dict[str, float]:
    for call in ways.values():
        call()
    times = interleave({name: itertools.repeat(call) for name, call in ways.items()}, seconds)
    return {name: amount / statistics.median(values) for name, values in times.items()}

"""Rates of matrix products for few rows: the fused ops' GEMM next to the libraries'.

A linear layer x [1, rows, K] -> [1, rows, N] with a bias, of a flow block's shapes: from the width
to four times as many and back, as fc1 and fc2 have them. Each library has its weights packed ahead
of the calls, if it can; ecar_kernels computes `linear_gated_residual` with a gate of one and a
residual of zero, which reads and writes more. A rate is two FLOPs a multiply-add over the median.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import commands, timing
from benchmarks.results import medians, table
from benchmarks.runtimes import DTYPES, OURS, Call, Work

WIDTHS, ROWS = (768, 1024, 1152), (16, 64, 128, 256, 512)
LAYERS = {
    f"{rows}x{inputs}x{outputs}": (rows, inputs, outputs)
    for width in WIDTHS
    for inputs, outputs in ((width, 4 * width), (4 * width, width))
    for rows in ROWS
}
NAMES = [f"{layer}-{dtype}" for layer in LAYERS for dtype in ("float32", "bfloat16")]
WAYS = (OURS, "MKL", "oneDNN", "OpenVINO", "ONNX Runtime")


def mkl(layer: nn.Linear, x: Tensor) -> Call:
    if x.dtype != torch.float32:
        raise NotImplementedError(f"PyTorch multiplies {x.dtype} by oneDNN")
    if not torch.backends.mkl.is_available():
        raise NotImplementedError("this PyTorch is built without MKL")
    return functools.partial(layer, x)


def onednn(layer: nn.Linear, x: Tensor) -> Call:
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), len(x[0]))
    run = torch.ops.mkldnn._linear_pointwise.default
    return functools.partial(run, x, packed, layer.bias, "none", [], "")


@torch.no_grad()
def measure(name: str, seconds: float) -> dict[str, list]:
    shape, _, dtype = name.rpartition("-")
    rows, inputs, outputs = LAYERS[shape]
    torch.manual_seed(0)  # the weights of the files that there are
    work, x = Work(f"linear-{shape}", dtype), torch.randn(1, rows, inputs)
    module = nn.Linear(inputs, outputs)
    work.add_runtimes(module, [x], network=(0,), names=("OpenVINO", "ONNX Runtime"))
    layer, given = nn.Linear(inputs, outputs), x.to(DTYPES[dtype])
    layer.load_state_dict(module.state_dict())
    layer.to(DTYPES[dtype])
    work.add("MKL", lambda: mkl(layer, given))
    work.add("oneDNN", lambda: onednn(layer, given))
    packed = timing.packed_linear(layer.weight.detach(), layer.bias.detach(), rows)
    work.add(OURS, lambda: functools.partial(packed, given))
    return {"rows": [work.measured(seconds) | {"name": name}]}


def render(record: dict[str, Any]) -> str:
    return table([_cells(row) for row in record["rows"]])


def _cells(row: dict[str, Any]) -> dict[str, str]:
    shape, _, dtype = row["name"].rpartition("-")
    rows, inputs, outputs = LAYERS[shape]
    found, flops = medians(row), 2e-9 * rows * inputs * outputs
    rates = {way: f"{flops / found[way]:.0f}" if way in found else "-" for way in WAYS}
    return {
        "rows": str(rows),
        "layer": f"{inputs} to {outputs}",
        "dtype": dtype,
        **{f"{way}, GFLOP/s": rate for way, rate in rates.items()},
    }


main = functools.partial(
    commands.main, "gemm", __doc__, measure, NAMES, render, seconds=15, order=NAMES
)

if __name__ == "__main__":
    sys.exit(main())

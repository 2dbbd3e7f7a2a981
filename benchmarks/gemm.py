"""`python -m benchmarks.gemm`: what the libraries' GEMMs give at a flow block's sizes, and ours.

Each library computes the linear layer alone; ours is the whole fused op, LayerNorm, modulation,
GELU, gate and residual included. Weights are used in turn from a set larger than any cache, as a
sampler's step uses them. Figures are GFLOP/s of the linear layer's multiply-adds, medians of
interleaved repeats, and in brackets the fraction of the best library's rate at 512 rows.
On one thread the clock counts the thread's own time, so that a busy machine can be used.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, linears, results
from benchmarks.results import markdown
from ecar_kernels.registry import resolve

ROWS = (16, 64, 256, 512)
WIDTHS = (768, 1024, 1152)
WEIGHTS_BYTES = 128 * 2**20
FULL = "best_library_at_512_rows"


def layers(width: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a flow block's four linear layers."""
    return {
        "qkv": (3 * width, width),
        "proj": (width, width),
        "fc1": (4 * width, width),
        "fc2": (width, 4 * width),
    }


def fused_op(
    layer: str, rows: int, outputs: int, inputs: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Our op in this layer's place, its other arguments bound: weight, bias -> output."""
    name = "adaln_linear" if layer in ("qkv", "fc1") else "linear_gated_residual"
    op = resolve(name, device="cpu", dtype=torch.float32, backend="native")
    x = torch.randn(1, rows, inputs)
    if name == "adaln_linear":
        shift, scale = torch.randn(1, rows, 2 * inputs).chunk(2, -1)
        step_shift, step_scale = torch.randn(1, 1, 2 * inputs).chunk(2, -1)
        activation = "gelu_tanh" if layer == "fc1" else None
        return lambda weight, bias: op(
            x,
            shift,
            scale,
            weight,
            bias,
            step_shift=step_shift,
            step_scale=step_scale,
            activation=activation,
        )
    gate, residual, step = (torch.randn(1, n, outputs) for n in (rows, rows, 1))
    return lambda weight, bias: op(x, weight, bias, gate, residual, step_gate=step)


def candidates(layer: str, rows: int, outputs: int, inputs: int) -> dict[str, list[Callable]]:
    """For each path one call for every weight; packing is done here, outside the timing."""
    count = min(64, max(2, WEIGHTS_BYTES // (4 * outputs * inputs)))
    weights = [torch.randn(outputs, inputs) for _ in range(count)]
    bias, x = torch.randn(outputs), torch.randn(1, rows, inputs)
    found: dict[str, list[Callable]] = {}
    for weight in weights:
        for name, path in linears.libraries(weight, bias, rows).items():
            found.setdefault(name, []).append(lambda path=path: path(x))
    fused = fused_op(layer, rows, outputs, inputs)
    found["ours, fused"] = [lambda w=w: fused(w, bias) for w in weights]
    return found


def rates(paths: dict[str, list[Callable]], flops: int, seconds: float) -> dict[str, float]:
    """GFLOP/s of each path, rounds of all paths interleaved."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in paths}
    for calls in paths.values():
        for call in calls:
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, calls in paths.items():
            for call in calls:
                start = clock()
                call()
                times[name].append(clock() - start)
    return {name: flops / statistics.median(values) * 1e-9 for name, values in times.items()}


@torch.no_grad()
def measure(widths: list[int], rows: list[int], seconds: float) -> list[dict]:
    """One record for each layer and number of rows, printed as it comes."""
    records = []
    for width in widths:
        for layer, (outputs, inputs) in layers(width).items():
            table = {
                n: rates(candidates(layer, n, outputs, inputs), 2 * n * outputs * inputs, seconds)
                for n in sorted({*rows, max(ROWS)})
            }
            full = max(rate for name, rate in table[max(ROWS)].items() if "ours" not in name)
            for n in rows:
                print(
                    f"{width:5} {layer:5}{n:4} rows "
                    + " ".join(
                        f"| {name} {rate:6.1f} ({rate / full:4.0%})"
                        for name, rate in table[n].items()
                    ),
                    flush=True,
                )
                records.append(
                    {"width": width, "layer": layer, "rows": n, "gflops": table[n], FULL: full}
                )
    return records


def render(record: dict[str, Any]) -> str:
    """GFLOP/s by layer and rows, in brackets the fraction of the best library's at 512 rows."""
    names = list(dict.fromkeys(name for row in record["records"] for name in row["gflops"]))
    rows = [
        (
            str(row["width"]),
            row["layer"],
            str(row["rows"]),
            *(
                f"{row['gflops'][name]:.0f} ({row['gflops'][name] / row[FULL]:.0%})"
                if name in row["gflops"]
                else "-"
                for name in names
            ),
        )
        for row in record["records"]
    ]
    return markdown(("width", "layer", "rows", *names), rows) + (
        "\n\nGFLOP/s, and the fraction of the best library's rate at 512 rows. The libraries' is "
        "the linear layer alone,\nours the whole fused op."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gemm", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help="for each layer and number of rows (default: %(default)s)",
    )
    parser.add_argument("--results", type=Path, help="folder to write <device>/gemm.json into, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = environment.describe()
    print(results.where(facts))
    records = measure(options.widths, options.rows, options.seconds)
    if options.results is not None:
        results.write(results.path("gemm", options.results), "gemm", facts, records=records)


if __name__ == "__main__":
    main()

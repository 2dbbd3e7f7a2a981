"""Timing by turns, so that a machine's moods hit all variants, and what the machine reaches.

On the CPU the host's clock counts. On CUDA it would count the host that is late with its launches:
the calls of a variant are captured as one graph, and a replay is timed between events. What cannot
be captured is queued behind a kernel that waits.
"""

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import CPU
from ecar.sampling.graph import CudaRecorder
from ecar_kernels import _native
from ecar_kernels.costs import Rates
from ecar_kernels.flow_block import packing

WAIT_CYCLES = 20_000_000  # about 10 ms: time to queue the calls behind it
Call = Callable[[], object]
T = TypeVar("T")


def seconds_of(call: Call) -> float:
    """One call; freeing its result is part of it."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rounds(
    measures: Mapping[Any, Callable[[], T]],
    seconds: float,
    *,
    at_least: int = 5,
    at_most: int = 100_000,
    warm_up: bool = False,
) -> dict[Any, list[T]]:
    """What each measure returns, one call of each a round, for `seconds`, without Python's garbage
    collector. warm_up: one round before that is not counted."""
    for measure in measures.values() if warm_up else ():
        measure()
    found: dict[Any, list[T]] = {name: [] for name in measures}
    collecting = gc.isenabled()
    gc.disable()
    try:
        count, end = 0, time.perf_counter() + seconds
        while count < at_least or (count < at_most and time.perf_counter() < end):
            for name, measure in measures.items():
                found[name].append(measure())
            count += 1
    finally:
        if collecting:
            gc.enable()
    return found


class Clock:
    """Measures a variant: seconds of one call.

    calls: endless; what the iterator does to give the next one is not timed. On the CPU each
    measurement is of the next call; on CUDA of the first `count` together, by "graph" or "stream"
    (`how`).
    """

    def __init__(self, calls: Iterable[Call], count: int = 1, device: torch.device = CPU) -> None:
        self.calls, self.count, self.how = iter(calls), count, "host"
        if device.type == "cuda":
            self._record(device)

    def _record(self, device: torch.device) -> None:
        recorder = CudaRecorder(device)
        self.stream, self.how = recorder.stream, "stream"
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):  # forwards, too, whose stream is their backwards'
            chosen = list(itertools.islice(self.calls, self.count))
            for call in chosen[:3]:
                call()
            # All results alive together: in a graph, each call writes to memory of its own.
            self.run: Call = lambda: [call() for call in chosen]
            torch.cuda.synchronize()
            try:
                self.run, self.how = recorder.record(self.run), "graph"
                self.run()
            except RuntimeError:
                torch.cuda.synchronize()

    def __call__(self) -> float:
        if self.how == "host":
            return seconds_of(next(self.calls))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            if self.how == "stream":
                torch.cuda._sleep(WAIT_CYCLES)
            begin.record()
            self.run()
            end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.count


def summary(values: list[float], unit: float = 1.0) -> dict[str, float]:
    """Median and quartiles of the rounds, each divided by `unit` (the calls of a round, say)."""
    q1, median, q3 = (np.quantile(values, (0.25, 0.5, 0.75)) / unit).tolist()
    return {"rounds": len(values), "median": median, "q1": q1, "q3": q3}


def summaries(times: Mapping[str, list[float]], unit: float = 1.0) -> dict[str, dict[str, float]]:
    return {name: summary(values, unit) for name, values in times.items()}


@torch.no_grad()
def measure_rates(
    seconds: float = 2.0,
    device: torch.device = CPU,
    *,
    copy_bytes: int | None = None,
    width: int | None = None,
) -> tuple[Rates, dict[str, float]]:
    """The best rates of a copy and of products, and all that were tried, per second.

    On the CPU the products are those of E-CAR-L's MLP, from its width to four times as many and
    back, in float32; on CUDA large squares by number format. There launches in a graph are
    counted, too.
    """
    cuda = device.type == "cuda"
    copy_bytes = copy_bytes or (2**30 if cuda else 2**26)
    source, one = torch.randn(copy_bytes // 4, device=device), torch.zeros(1, device=device)
    target = torch.empty_like(source)
    calls: dict[str, tuple[float, Call]] = (
        _linears(width or 1152)
        if not cuda
        else {"launch": (1, lambda: one.add_(1)), **_squares(width or 8192, device)}
    )
    calls["copy"] = 2 * copy_bytes, lambda: target.copy_(source)
    clocks = {
        name: Clock(itertools.repeat(call), 1000 if name == "launch" else 1, device)
        for name, (_, call) in calls.items()
    }
    taken = rounds(clocks, seconds, warm_up=True)
    tried = {name: calls[name][0] / statistics.median(values) for name, values in taken.items()}
    return Rates(tried["copy"], max(v for k, v in tried.items() if k.startswith("GEMM"))), tried


def _linears(width: int) -> dict[str, tuple[float, Call]]:
    found = {}
    for rows, inputs in itertools.product((512, 2048), (width, 4 * width)):
        outputs = 5 * width - inputs
        linear = packed_linear(torch.randn(outputs, inputs), torch.randn(outputs), rows)
        call = functools.partial(linear, torch.randn(1, rows, inputs))
        found[f"GEMM: {rows} x {inputs} x {outputs}"] = rows * inputs * outputs, call
    return found


def _squares(side: int, device: torch.device) -> dict[str, tuple[float, Call]]:
    def multiply(a: Tensor, b: Tensor, precision: str) -> Tensor:
        torch.backends.cuda.matmul.fp32_precision = precision
        return a @ b

    found = {}
    for name in ("bfloat16", "tf32", "float32"):
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        precision = "tf32" if name == "tf32" else "ieee"
        found[f"GEMM: {name}"] = side**3, functools.partial(multiply, a, b, precision)
    return found


def packed_linear(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """A linear layer of x [1, rows, K]: the flow block's GEMM with a neutral epilogue, a gate of
    one and a residual of zero; nn.Linear's where the C++ library is missing."""
    if _native.why_not() is not None:
        return lambda x: F.linear(x, weight, bias)
    run = torch.ops.ecar.packed_linear_gated_residual.default
    packed, outputs = packing.packed_weight(weight), weight.shape[0]
    gate = torch.ones(1, 1, outputs, dtype=weight.dtype)
    residual = torch.zeros(1, 1, outputs, dtype=weight.dtype).expand(1, rows, outputs)
    return lambda x: run(x, packed, bias, gate, residual, None)

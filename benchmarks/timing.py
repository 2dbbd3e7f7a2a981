"""Timing by turns, so that a machine's moods hit all variants, and what the machine reaches."""

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ecar_kernels import _native
from ecar_kernels.costs import Rates
from ecar_kernels.flow_block import packing

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


def interleave(
    variants: Mapping[str, Iterator[Call]], seconds: float, **limits: int
) -> dict[str, list[float]]:
    """Seconds of each variant's calls, one a round; what an iterator does to give its next call is
    not timed. limits: of `rounds`."""
    measures = {
        name: lambda calls=calls: seconds_of(next(calls)) for name, calls in variants.items()
    }
    return rounds(measures, seconds, **limits)


def summary(values: list[float], unit: float = 1.0) -> dict[str, float]:
    """Median and quartiles of the rounds, each divided by `unit` (the calls of a round, say)."""
    cuts = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    q1, median, q3 = (value / unit for value in cuts)
    return {"rounds": len(values), "median": median, "q1": q1, "q3": q3}


def summaries(times: Mapping[str, list[float]], unit: float = 1.0) -> dict[str, dict[str, float]]:
    return {name: summary(values, unit) for name, values in times.items()}


@torch.no_grad()
def measure_rates(
    seconds: float = 2.0, *, copy_bytes: int = 64 * 2**20, width: int = 1152
) -> tuple[Rates, dict[str, float]]:
    """The best rates of a copy and of float32 products, and all that were tried, per second.

    The products are those of E-CAR-L's MLP: from its width to four times as many and back.
    """
    source = torch.randn(copy_bytes // 4)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source)}
    amounts = {"copy": 2 * copy_bytes}
    for rows, inputs in itertools.product((512, 2048), (width, 4 * width)):
        outputs = 5 * width - inputs
        name, x = f"GEMM: {rows} x {inputs} x {outputs}", torch.randn(1, rows, inputs)
        linear = packed_linear(torch.randn(outputs, inputs), torch.randn(outputs), rows)
        calls[name] = functools.partial(linear, x)
        amounts[name] = rows * inputs * outputs
    measures = {name: functools.partial(seconds_of, call) for name, call in calls.items()}
    taken = rounds(measures, seconds, warm_up=True)
    tried = {name: amounts[name] / statistics.median(values) for name, values in taken.items()}
    return Rates(tried["copy"], max(rate for name, rate in tried.items() if name != "copy")), tried


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

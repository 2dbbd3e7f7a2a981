"""Interleaved timing: each variant once a round, so that a machine's moods hit all of them."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

Call = Callable[[], object]
T = TypeVar("T")


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """A block in which Python's garbage collector does not run on its own."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def seconds_of(call: Call) -> float:
    """One call; freeing its result is part of it."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rounds(
    measures: Mapping[str, Callable[[], T]],
    seconds: float,
    *,
    at_least: int = 5,
    at_most: int = 100_000,
    warm_up: bool = False,
) -> dict[str, list[T]]:
    """What each measure returns, one call of each a round, for `seconds`.

    warm_up: one round before that is not counted.
    """
    for measure in measures.values() if warm_up else ():
        measure()
    found: dict[str, list[T]] = {name: [] for name in measures}
    with no_collection():
        count, end = 0, time.perf_counter() + seconds
        while count < at_least or (count < at_most and time.perf_counter() < end):
            for name, measure in measures.items():
                found[name].append(measure())
            count += 1
    return found


def interleave(
    variants: Mapping[str, Iterator[Call]], seconds: float, **limits: int
) -> dict[str, list[float]]:
    """Seconds of each variant's calls, one a round; limits: of `rounds`.

    What an iterator does to give its next call is not timed; freeing the result is. The caller
    warms the variants up.
    """
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

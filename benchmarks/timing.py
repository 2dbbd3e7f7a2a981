"""Interleaved timing: each variant once a round, so that a machine's moods hit all of them."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

Call = Callable[[], object]


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


def interleave(
    variants: Mapping[str, Iterator[Call]],
    seconds: float,
    *,
    min_rounds: int = 5,
    max_rounds: int = 100_000,
) -> dict[str, list[float]]:
    """Seconds of each variant's calls, one a round, for `seconds`.

    What an iterator does to give its next call is not timed; freeing the result is. The caller
    warms the variants up.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    rounds = 0
    with no_collection():
        end = time.perf_counter() + seconds
        while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < end):
            for name, calls in variants.items():
                times[name].append(seconds_of(next(calls)))
            rounds += 1
    return times


def summary(values: list[float], unit: float = 1.0) -> dict[str, float]:
    """Median and quartiles of the rounds, each divided by `unit` (the calls of a round, say)."""
    cuts = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    q1, median, q3 = (value / unit for value in cuts)
    return {"rounds": len(values), "median": median, "q1": q1, "q3": q3}


def summaries(times: Mapping[str, list[float]], unit: float = 1.0) -> dict[str, dict[str, float]]:
    return {name: summary(values, unit) for name, values in times.items()}

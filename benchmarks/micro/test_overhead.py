"""What one call costs beside its arithmetic: at 16 x 768 out of the cache, and with next to none.

`least` is the same call on 8 channels of one token (a pixel for the flow step), where hardly
anything is computed: what is left is the call itself.
"""

import itertools
import statistics

import pytest
import torch

import ecar_kernels
from benchmarks import cases, timing
from ecar_kernels import resolve

CALLS = 100  # in a round
CASES = [cases.Case(op, 16, 1, cases.SIZES[0]) for op in cases.OPS]


def least(case: cases.Case, arguments: dict) -> dict:
    """The arguments cut down to one token of 8 channels, or one pixel."""

    def cut(name, value):
        if name == "shape":
            return (1, 1, 1)
        if name == "stage_lengths":
            return (1,)
        if not isinstance(value, torch.Tensor) or name == "seeds":
            return value
        if name in ("q", "k", "v"):
            return value[:, :1, :1, :8]
        if value.ndim == 4:
            return value[:, :1, :1, :1]
        if value.ndim == 3:
            return value[:, :1, :8]
        if name == "positions":
            return value[:1, :8]
        return value[:8, :8].clone() if value.ndim == 2 else value[:8]

    return {name: cut(name, value) for name, value in arguments.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
@torch.no_grad()
def test_overhead(benchmark, case, in_time, seconds, arena):
    def native(**arguments):
        return ours(**arguments)

    ours = resolve(case.op, device="cpu", dtype=cases.DTYPE)
    public = getattr(ecar_kernels, case.op)
    eager = resolve(case.op, device="cpu", dtype=cases.DTYPE, backend="reference")
    arguments = cases.inputs(case, arena)
    small = least(case, arguments)
    ways = {
        "api": (public, arguments),
        "eager": (eager, arguments),
        "least": (ours, small),
        "api, least": (public, small),
        "eager, least": (eager, small),
    }

    def repeat(function, given):
        for _ in itertools.repeat(None, CALLS):
            function(**given)

    for function, given in (*ways.values(), (ours, arguments)):
        repeat(function, given)
    times = {name: [] for name in ways}

    def setup():
        for name, (function, given) in ways.items():
            function(**given)  # the first call after another way's is not what is asked for
            call = lambda function=function, given=given: repeat(function, given)  # noqa: E731
            times[name].append(timing.seconds_of(call) / CALLS)
        ours(**arguments)

    start = statistics.median(timing.seconds_of(setup) for _ in range(3))
    for values in times.values():
        values.clear()
    rounds = max(5, min(200, int(seconds / start)))
    with timing.no_collection():
        benchmark.pedantic(repeat, args=(ours, arguments), setup=setup, rounds=rounds)
    benchmark.extra_info.update(
        op=case.op,
        size=case.size,
        tokens=case.tokens,
        batch=case.batch,
        overhead=True,
        calls=CALLS,
        seconds=timing.summaries(times),
    )

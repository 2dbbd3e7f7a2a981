"""Every op at the stages of models, and at 64 MiB: eager, compiled, ours, peers, and the floor.

pytest-benchmark times ours; before each of its rounds, untimed by it, the other ways take their
turn and are timed in the same manner, so that a machine's moods hit all of them.
"""

import time

from benchmarks import cases, timing
from benchmarks.micro import variants
from ecar_kernels.costs import floor_seconds

MIN_ROUNDS, MAX_ROUNDS = 5, 2000
LONG_ROUND, LONG_ROUNDS = 1.5, 3  # seconds of a round from which on fewer are enough


def pytest_generate_tests(metafunc):
    chosen = cases.every() if metafunc.config.getoption("--ecar-full") else cases.default()
    # Most important first: a run that ends early has left the last ones out.
    ordered = dict.fromkeys([*cases.at_64_mib(), *chosen])
    metafunc.parametrize("case", ordered, ids=lambda case: case.name)


def test_op(benchmark, case, in_time, measured_rates, seconds, arena):
    sets = list(cases.input_sets(case, arena))
    calls, failures = {}, {}
    functions = variants.functions(case)
    for name, function in functions.items():
        if (reason := variants.why_not(case, name, function, sets)) is None:
            calls[name] = variants.calls(case, function, sets)
        else:  # a row says what a way cannot do
            failures[name] = reason
    ours, others = calls.pop("ours"), calls
    times = {name: [] for name in others}

    def setup():
        for name, turns in others.items():
            times[name].append(timing.seconds_of(next(turns)))
        return (next(ours),), {}

    def target(call):
        call()  # whose result is freed here, as the others' are

    start = time.perf_counter()
    target(*setup()[0])
    round_seconds = time.perf_counter() - start
    least = LONG_ROUNDS if round_seconds > LONG_ROUND else MIN_ROUNDS
    rounds = max(least, min(MAX_ROUNDS, int(seconds / round_seconds)))
    for values in times.values():
        values.clear()
    with timing.no_collection():
        benchmark.pedantic(target, setup=setup, rounds=rounds)
    cost = variants.case_cost(case, sets[0])
    benchmark.extra_info.update(
        op=case.op,
        size=case.size,
        tokens=case.tokens,
        batch=case.batch,
        backward=case.backward,
        whole=case.whole,
        sets=len(sets),
        backend=variants.backend(case, functions["ours"]),
        bytes=cost.bytes,
        multiply_adds=cost.multiply_adds,
        floor_seconds=floor_seconds(cost, measured_rates[0]),
        seconds=timing.summaries(times),
        failures=failures,
    )

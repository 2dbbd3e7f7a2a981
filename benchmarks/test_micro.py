"""The rows of `python -m benchmarks` by pytest-benchmark, for its comparisons and its JSON.

    pytest benchmarks --benchmark-only -k "adaln-forward-S" --benchmark-group-by=param:case
    pytest benchmarks --benchmark-autosave ... ; pytest-benchmark compare

One test for each row and way to compute it; where there is no pytest-benchmark, none.
"""

from functools import cache

import pytest

from benchmarks import cases, micro
from benchmarks.cases import Case

pytest.importorskip("pytest_benchmark")


@cache
def arena() -> cases.Arena:
    return cases.Arena(cases.ARENA_BYTES, cases.DTYPE)


@pytest.mark.parametrize("way", micro.OWN)
@pytest.mark.parametrize("case", cases.default(), ids=lambda case: case.name)
def test_op(benchmark, case: Case, way: str):
    function = micro.functions(case)[way]
    sets = list(cases.input_sets(case, arena()))
    if (reason := micro.why_not(case, way, function, sets)) is not None:
        pytest.skip(reason)
    turns = micro.calls(case, function, sets)
    benchmark.extra_info.update(micro.identity(case))

    def inputs():
        """The next call, its forward done where a backward is timed."""
        return (next(turns),), {}

    benchmark.pedantic(lambda call: call(), setup=inputs, rounds=30, warmup_rounds=3)

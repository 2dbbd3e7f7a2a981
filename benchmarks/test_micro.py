"""The rows of `python -m benchmarks` by pytest-benchmark, for its comparisons and its JSON.

One test for each row and way to compute it; where there is no pytest-benchmark, none.
"""

import pytest

from benchmarks import cases, micro
from benchmarks.cases import Case

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize("way", micro.OWN)
@pytest.mark.parametrize("case", cases.default(), ids=lambda case: case.name)
def test_op(benchmark, case: Case, way: str):
    function, sets = micro.functions(case)[way], cases.input_sets(case)
    if (reason := micro.why_not(case, way, function, sets)) is not None:
        pytest.skip(reason)
    turns = micro.calls(case, function, sets)
    benchmark.extra_info.update(vars(case))
    # The next call comes with its forward done, where a backward is timed.
    benchmark.pedantic(
        lambda call: call(), setup=lambda: ((next(turns),), {}), rounds=30, warmup_rounds=3
    )

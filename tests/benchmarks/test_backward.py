"""What the profile of a backward's time counts."""

import pytest

from benchmarks import backward, cases
from ecar_kernels.costs import Rates

RATES = Rates(1e10, 1e11)


@pytest.mark.parametrize("op", ["adaln", "euler_step"])
def test_a_row_has_the_ways_and_the_time_in_ops_and_renders(op):
    size = "S" if op == "adaln" else "-"
    arena = cases.Arena(2**24, cases.DTYPE)
    row = backward.measure(cases.Case(op, 16, 1, size, backward=True), arena, RATES, 0)
    assert set(row["seconds"]) == {"compiled", "ours"}
    # A forward's op is of the same kind, but not within the call.
    assert 0 < row["ops"] < 1
    text = backward.render({"rows": [row]})
    assert f"| {op} " in text and "floor of the op" in text


def test_the_rest_of_a_call_is_what_is_not_in_ops():
    row = {
        "op": "adaln",
        "size": "S",
        "tokens": 16,
        "batch": 8,
        "ops": 60e-6,
        "floor_seconds": 30e-6,
        "seconds": {"ours": {"median": 100e-6}, "compiled": {"median": 90e-6}},
    }
    cells = [cell.strip() for cell in backward.render({"rows": [row]}).splitlines()[2].split("|")]
    assert cells[5:-1] == ["90.0 us", "100 us", "60.0 us", "40.0 us", "30.0 us"]

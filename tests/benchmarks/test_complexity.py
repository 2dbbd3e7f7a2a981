"""A.2: the right calls are counted, exponents fitted, and a tiny run renders."""

import pytest

from benchmarks.paper import complexity


def test_calls_of_each_way_make_all_tokens():
    n = 15
    assert complexity.calls_of(n, "token by token") == [(i, i) for i in range(1, n + 1)]
    assert complexity.calls_of(n, "in stages") == [(1, 1), (3, 3), (7, 7), (15, 15)]
    assert complexity.calls_of(n, "in stages, with a cache") == [(1, 1), (2, 3), (4, 7), (8, 15)]
    for way in complexity.WAYS:
        if way.endswith("with a cache"):
            assert sum(new for new, _ in complexity.calls_of(n, way)) == n
        assert complexity.calls_of(n, way)[-1][1] == n


def test_exponents_are_those_of_the_paper_for_costs_of_squares():
    """Sums of i^2 over the calls grow as n^3 token by token and as n^2 in stages (A.2)."""
    for way, power in (("token by token", 3), ("in stages", 2)):
        rows = [
            {"tokens": n, "seconds": sum(q * k for q, k in complexity.calls_of(n, way))}
            for n in (511, 1023, 2047)
        ]
        assert complexity.exponent(rows) == pytest.approx(power, abs=0.05)


def test_a_tiny_run_renders():
    rows = [
        row for way in complexity.WAYS for row in complexity.measure(way, 0, tokens=(7, 31))["rows"]
    ]
    text = complexity.render({"rows": rows})
    assert "| in stages, with a cache " in text and "n^" in text
    for row in rows:
        assert row["timed_calls"] == min(row["calls"], complexity.SAMPLED)

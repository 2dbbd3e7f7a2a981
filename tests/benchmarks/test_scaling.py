"""The scaling benchmark counts the right calls, fits exponents, and renders at tiny sizes."""

import pytest

from benchmarks import scaling


def test_calls_of_each_way_make_all_tokens():
    n = 15
    assert scaling.attention_calls(n, "token by token") == [(i, i) for i in range(1, n + 1)]
    assert scaling.attention_calls(n, "in stages") == [(1, 1), (3, 3), (7, 7), (15, 15)]
    assert scaling.attention_calls(n, "in stages, with a cache") == [
        (1, 1),
        (2, 3),
        (4, 7),
        (8, 15),
    ]
    for way in scaling.WAYS:
        if way.endswith("with a cache"):
            assert sum(new for new, _ in scaling.attention_calls(n, way)) == n
        assert scaling.attention_calls(n, way)[-1][1] == n


def test_exponents_are_those_of_the_paper_for_costs_of_squares():
    """Sums of i^2 over the calls grow as n^3 token by token and as n^2 in stages (A.2)."""
    for way, power in (("token by token", 3), ("in stages", 2)):
        rows = [
            {"tokens": n, "seconds": sum(q * k for q, k in scaling.attention_calls(n, way))}
            for n in (511, 1023, 2047)
        ]
        assert scaling.exponent(rows) == pytest.approx(power, abs=0.05)


def test_a_tiny_run_renders():
    record = {
        "preset": "digits",
        "attention": scaling.attention_rows(0, tokens=(7, 31)),
        "images": scaling.image_rows(
            0, preset="digits", pixels={8: (4, 8)}, batches=(1, 2), step_counts=(20,)
        ),
    }
    assert [(row["batch"], row["steps"]) for row in record["images"]] == [
        (1, 250),
        (2, 250),
        (1, 20),
    ]
    text = scaling.render(record)
    assert "| in stages, with a cache " in text and "n^" in text
    for row in record["attention"]:
        assert row["timed_calls"] == min(row["calls"], scaling.SAMPLED)

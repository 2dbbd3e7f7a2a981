"""The judgement of benchmarks/instructions.py; its counts need valgrind and half a minute."""

import json

import pytest

from benchmarks import instructions

KNOWN = {"avx2": {"adaln float32 16x768": 1000, "sums float32 16x768": 100}}


@pytest.mark.parametrize(
    ("counts", "complaints"),
    [
        ({"adaln float32 16x768": 1010, "sums float32 16x768": 50}, []),
        (
            {"adaln float32 16x768": 1011, "sums float32 16x768": 100},
            ["avx2 adaln float32 16x768: 1,011, 1,000 committed"],
        ),
        ({"adaln float32 16x768": 1000}, ["avx2 sums float32 16x768: gone"]),
        ({**KNOWN["avx2"], "pack float32 16x768": 7}, ["avx2 pack float32 16x768: 7, new"]),
    ],
)
def test_a_call_may_not_take_more_than_a_percent_more(counts, complaints):
    facts = {"compiler": "g++", "machine": "x86_64"}
    committed = {**facts, "counts": KNOWN}
    assert instructions.compare({**facts, "counts": {"avx2": counts}}, committed) == complaints
    assert instructions.compare({**committed, "compiler": "clang++", "counts": {}}, committed) == []


@pytest.mark.skipif(not instructions.RESULTS.exists(), reason="an sdist has no results")
def test_the_committed_counts_are_whole():
    """Every set has the same calls, and each call takes instructions."""
    committed = json.loads(instructions.RESULTS.read_text("utf-8"))
    assert committed["compiler"] and committed["machine"]
    calls = [list(counts) for counts in committed["counts"].values()]
    assert len(calls) >= 1 and len(calls[0]) > 70 and all(c == calls[0] for c in calls)
    assert all(n > 0 for counts in committed["counts"].values() for n in counts.values())

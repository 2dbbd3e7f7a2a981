"""Interleaved timing and its summaries."""

import itertools

from benchmarks import timing


def test_variants_take_turns():
    order = []

    def turns(name):
        return itertools.repeat(lambda: order.append(name))

    times = timing.interleave({"a": turns("a"), "b": turns("b")}, 0, at_least=3)
    assert order == ["a", "b"] * 3
    assert [len(values) for values in times.values()] == [3, 3]
    times = timing.interleave({"a": turns("a")}, 60, at_most=7)
    assert len(times["a"]) == 7


def test_summaries_are_quartiles_of_one_call():
    summary = timing.summary([1.0, 2.0, 3.0, 4.0, 5.0], unit=10)
    assert summary == {"rounds": 5, "median": 0.3, "q1": 0.2, "q3": 0.4}
    assert timing.summary([2.0])["q3"] == 2.0


def test_a_warm_up_is_not_counted():
    count = itertools.count()
    found = timing.rounds({"a": lambda: next(count)}, 0, at_least=2, warm_up=True)
    assert found == {"a": [1, 2]}

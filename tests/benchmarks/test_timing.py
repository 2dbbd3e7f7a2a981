"""Interleaved timing and its summaries, and the rates that floors are computed from."""

import itertools

import torch
import torch.nn.functional as F

from benchmarks import timing


def test_variants_take_turns():
    order = []

    def turns(name):
        return itertools.repeat(lambda: order.append(name))

    clocks = {name: timing.Clock(turns(name)) for name in "ab"}
    times = timing.rounds(clocks, 0, at_least=3)
    assert order == ["a", "b"] * 3
    assert [len(values) for values in times.values()] == [3, 3]
    times = timing.rounds({"a": timing.Clock(turns("a"))}, 60, at_most=7)
    assert len(times["a"]) == 7


def test_summaries_are_quartiles_of_one_call():
    summary = timing.summary([1.0, 2.0, 3.0, 4.0, 5.0], unit=10)
    assert summary == {"rounds": 5, "median": 0.3, "q1": 0.2, "q3": 0.4}
    assert timing.summary([2.0])["q3"] == 2.0


def test_a_warm_up_is_not_counted():
    count = itertools.count()
    found = timing.rounds({"a": lambda: next(count)}, 0, at_least=2, warm_up=True)
    assert found == {"a": [1, 2]}


@torch.no_grad()
def test_a_packed_linear_layer_is_the_layer():
    weight, bias, x = torch.randn(40, 24), torch.randn(40), torch.randn(1, 5, 24)
    expected = F.linear(x.double(), weight.double(), bias.double())
    found = timing.packed_linear(weight, bias, 5)(x).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rates_are_the_best_of_what_was_tried():
    best, tried = timing.measure_rates(seconds=0.02, copy_bytes=2**20, width=16)
    gemms = [rate for name, rate in tried.items() if name.startswith("GEMM")]
    assert best.bytes_per_second == tried["copy"] > 0
    assert best.multiply_adds_per_second == max(gemms) > 0
    assert len(gemms) + 1 == len(tried)

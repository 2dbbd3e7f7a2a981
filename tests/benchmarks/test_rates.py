"""The rates that floors are computed from, and the ways to compute a linear layer."""

import torch
import torch.nn.functional as F

from benchmarks import rates


@torch.no_grad()
def test_all_ways_compute_the_same_layer():
    weight, bias, x = torch.randn(40, 24), torch.randn(40), torch.randn(1, 5, 24)
    expected = F.linear(x.double(), weight.double(), bias.double())
    for name, way in rates.linears(weight, bias, 5).items():
        torch.testing.assert_close(way(x).double(), expected, rtol=1e-5, atol=1e-5, msg=name)


def test_rates_are_the_best_of_what_was_tried():
    best, tried = rates.measure(seconds=0.02, copy_bytes=2**20, width=16)
    copies = [rate for name, rate in tried.items() if name.startswith("copy")]
    gemms = [rate for name, rate in tried.items() if name.startswith("GEMM")]
    assert best.bytes_per_second == max(copies) > 0
    assert best.multiply_adds_per_second == max(gemms) > 0
    assert len(copies) + len(gemms) == len(tried)

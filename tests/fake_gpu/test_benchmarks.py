"""`python -m benchmarks --device cuda`: what is timed of an op on a GPU."""

import pytest
import torch

from benchmarks import cases, micro
from ecar_kernels.costs import Rates


@pytest.mark.parametrize(
    ("op", "backward", "launches"),
    [("adaln", False, 1), ("adaln", True, 2), ("euler_step", False, 1)],
)
def test_a_graph_of_the_calls_with_all_sets_is_timed(gpus, monkeypatch, op, backward, launches):
    """On the fake GPU a launch takes a millisecond; a backward is timed without its forward."""
    monkeypatch.setattr(cases, "MAX_SETS", 3)
    size = "-" if op in cases.WIDTHLESS else "S"
    case = cases.Case(op, 16, 2, size, backward, dtype="bfloat16")
    device = torch.device("cuda:0")
    row = micro.measure(case, Rates(1e12, 1e14), 0, device, compiling=False)
    assert (row["sets"], row["how"], row["failures"]) == (3, "graph", {})
    assert row["backend"] in ("triton", "cuda")
    assert row["seconds"]["ours"]["median"] == pytest.approx(1e-3 * launches)
    assert row["seconds"]["eager"]["median"] > 1e-3 * launches


def test_rows_on_a_gpu_begin_with_what_fills_it():
    chosen = micro.choose(device=torch.device("cuda"), dtype="bfloat16")
    assert {case.dtype for case in chosen} == {"bfloat16"}
    assert {case.batch for case in chosen} >= {1, 8, 64}
    assert not any(case.overhead for case in chosen)
    small = [case.tokens < 256 for case in chosen]
    assert small == sorted(small)

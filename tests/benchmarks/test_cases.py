"""What is timed: every size, stage and batch, and inputs that the cache does not hold."""

import itertools

import pytest
import torch

from benchmarks import cases
from ecar_kernels.registry import OPS


def test_every_has_each_op_stage_size_and_batch():
    every = cases.every()
    assert len(every) == len(set(every))
    assert {case.op for case in every} == set(OPS)
    for op in ("adaln", "stage_attention"):
        found = {(c.size, c.tokens, c.batch) for c in every if c.op == op and c.backward}
        assert found >= set(itertools.product("SBL", (16, 64, 256), (1, 8, 32)))
        assert found >= {(cases.VAR, side**2, 1) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)}
        assert {size for size, *_ in found} >= {"S-512px", "S-1024px", "L-1024px"}
    assert set(cases.default()) < set(every)


def test_cases_beyond_caches_hold_that_much():
    for case in cases.beyond_caches():
        width = {"adaln": case.tokens * case.model.width if case.size != "-" else 0}
        side = 2 * 16
        count = width["adaln"] or 4 * side**2
        if case.op == "upsample_renoise_euler":
            count *= 4  # the image that it makes has twice the side
        mebibytes = 18 if case.size == "L" else 64
        assert case.batch * count * 4 == mebibytes * 2**20, case.name


@pytest.mark.parametrize("op", ["adaln", "euler_step", "linear_gated_residual"])
def test_sets_of_inputs_are_larger_than_the_cache_or_many(op, monkeypatch):
    monkeypatch.setattr(cases, "last_level_cache", lambda device: 2**20)
    case = cases.Case(op, 16, 2, "-" if op in cases.WIDTHLESS else "S")
    sets = cases.input_sets(case)
    held = sum(
        value.numel() * value.element_size()
        for given in sets
        for value in given.values()
        if isinstance(value, torch.Tensor)
    )
    assert held >= cases.ROTATION * 2**20 or len(sets) == cases.MAX_SETS
    firsts = [given["x" if "x" in given else "h"] for given in sets[:2]]
    assert len(sets) == 1 or not torch.equal(*firsts)

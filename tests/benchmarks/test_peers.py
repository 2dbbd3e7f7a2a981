"""Other libraries' attention computes the same as the reference, or says why it does not."""

import warnings

import pytest
import torch

from benchmarks import cases, micro, peers
from tests.support.accuracy import assert_accurate


@pytest.mark.parametrize(
    "case",
    [
        cases.Case("stage_attention", 16, 1, "S"),
        cases.Case("stage_attention", 9, 1, cases.VAR, whole=True),
        cases.Case("stage_attention", 4, 2, cases.VAR, backward=True),
    ],
    ids=lambda case: case.name,
)
def test_attentions_peers_compute_the_same_or_say_why_not(case):
    given = cases.inputs(case)
    functions = micro.functions(case)
    reasons, right = {}, 0
    for name in peers.functions(case.op):
        if (why := micro.why_not(case, name, functions[name], [given])) is not None:
            reasons[name] = why
            continue
        with torch.set_grad_enabled(case.backward):
            assert_accurate(functions[name], functions["eager"], given, gradients=case.backward)
        right += 1
    assert right >= 2  # SDPA's math and flash serve every machine
    assert set(reasons) <= {"FlexAttention", "SDPA efficient", "SDPA cudnn"}
    if case.backward and "FlexAttention" in reasons:
        assert "FlexAttention does not support backward" in reasons["FlexAttention"]


@pytest.mark.parametrize("name", ["SDPA math", "SDPA flash"])
def test_a_call_by_stage_is_the_masked_one(name):
    case = cases.Case("stage_attention", 25, 2, cases.VAR, whole=True)
    masked, by_stage = (peers.functions(case.op, per_stage=way)[name] for way in (False, True))
    assert_accurate(by_stage, masked, cases.inputs(case))


def test_reasons_are_one_line():
    def refused():
        warnings.warn("Flash attention kernel not used because:", stacklevel=1)
        warnings.warn("a mask was given.\nmore", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    assert peers.why_not(refused) == "RuntimeError: No available kernel; a mask was given."
    assert peers.why_not(lambda: None) is None

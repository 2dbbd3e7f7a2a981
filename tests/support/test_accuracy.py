"""The rule itself: it lets rounding pass and nothing else."""

import pytest
import torch

from ecar_kernels.testing import judge_functions
from tests.support.accuracy import assert_accurate


def double(x):
    return x * 2


def test_rounding_passes():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_accurate(lambda x: x + x, double, {"x": torch.randn(9, 9).to(dtype)}, gradients=True)


def test_zero_size_passes():
    assert_accurate(double, double, {"x": torch.randn(0, 3)}, gradients=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_single_wrong_element_fails(dtype):
    def wrong(x):
        y = double(x)
        y[7, 7] += 0.5
        return y

    with pytest.raises(AssertionError, match="result 0: "):
        assert_accurate(wrong, double, {"x": torch.randn(200, 200).to(dtype)})


def test_a_small_bias_everywhere_fails():
    with pytest.raises(AssertionError, match="result 0: error"):
        assert_accurate(lambda x: double(x) + 1e-5, double, {"x": torch.randn(50, 50)})


def test_a_wrong_gradient_fails():
    with pytest.raises(AssertionError, match="result 1: "):
        assert_accurate(lambda x: x + x.detach(), double, {"x": torch.randn(50)}, gradients=True)


def test_a_wrong_type_or_shape_fails():
    with pytest.raises(AssertionError, match="result 0: "):
        assert_accurate(lambda x: double(x).double(), double, {"x": torch.randn(5)})
    with pytest.raises(AssertionError, match="result 0: "):
        assert_accurate(lambda x: double(x)[None], double, {"x": torch.randn(5)})


def test_few_values_are_judged_by_the_median():
    """One judgement in nine that is past the bound passes; five, or NaN in one, do not."""

    def judged(wrong, size=4):
        calls = iter(range(9))

        def candidate(x):
            return [wrong[number] + x if (number := next(calls)) in wrong else x + 0.0]

        def plain(x):
            return [x + 0.0]

        found = judge_functions(candidate, plain, plain, lambda: [torch.randn(size)])
        return all(verdict.ok for verdict in found), 9 - len(list(calls))

    assert judged({}) == (True, 9) and judged({}, 5000) == (True, 1)
    assert judged({0: 1.0, 3: 1.0, 5: 0.1, 8: 1.0}) == (True, 9)
    assert judged(dict.fromkeys((0, 3, 5, 7, 8), 0.1)) == (False, 9)
    assert judged({4: float("nan")}) == (False, 9) and judged({0: 0.1}, 5000) == (False, 1)

"""The rule itself: it lets rounding pass and nothing else."""

import pytest
import torch

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

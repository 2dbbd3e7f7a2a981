"""Gradients in Triton where queries see few keys, and one may have nearly all the weight."""

import pytest
import torch

from ecar_kernels.registry import KERNEL_DTYPES
from ecar_kernels.stage_attention import reference
from tests.support.accuracy import assert_accurate, run
from tests.support.triton_attention import check, packed

triton = pytest.importorskip("ecar_kernels.stage_attention.triton")


def test_one_key_s_gradients_are_rounding_alone():
    call = packed((1,), batch=2, head_dim=72)
    _, grad_q, grad_k, grad_v = run(triton.stage_attention, call, None,
                                    [torch.randn_like(call["q"])])
    assert max(grad_q.abs().max(), grad_k.abs().max()) <= 1e-5 and grad_v.all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("stages", [(2,), (3,), (1, 1), (1, 2), (7,)], ids=str)
def test_one_of_a_few_keys_has_nearly_all_the_weight(stages, dtype):
    """Then delta is its weight's gradient, and what is left of their difference is judged."""
    for scale in (0.3, -0.3):
        check(packed(stages, batch=2, head_dim=96, dtype=dtype) | {"scale": scale})


def test_weights_that_sum_to_nearly_one():
    """As where a score is rounded once on its way into the logsumexp, and not in a weight."""
    def ours(q, k, v, grad):
        out, lse = triton._forward(q, k, v, (1, 1), 0.3)
        lse = lse + torch.empty_like(lse).uniform_(-5e-7, 5e-7)
        return triton._backward(grad, q, k, v, out, lse, (1, 1), 0.3)[:2]

    def exact(q, k, v, grad):
        q, k = (x.detach().requires_grad_() for x in (q, k))
        out = reference.stage_attention(q, k, v, (1, 1), scale=0.3)
        return torch.autograd.grad(out, (q, k), grad)

    for _ in range(10):
        call = packed((1, 1), batch=4, head_dim=96)
        del call["stage_lengths"]
        assert_accurate(ours, exact, call | {"grad": torch.randn_like(call["q"])})


@pytest.mark.parametrize("stages", [(2,), (3,), (1, 2)], ids=str)
def test_gradients_of_a_few_keys(stages):
    """What a rounding of the weights' gradients leaves in their difference from their mean."""
    for _ in range(4):
        check(packed(stages, batch=2, head_dim=256))

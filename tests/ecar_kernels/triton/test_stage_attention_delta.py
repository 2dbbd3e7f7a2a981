"""Gradients in Triton where one key has nearly all the weight.

Delta is that weight's gradient then, and what is left of their difference is judged.
"""

import pytest
import torch

from ecar_kernels.registry import KERNEL_DTYPES
from ecar_kernels.stage_attention import launch, reference
from tests.support.accuracy import assert_accurate, run
from tests.support.triton_attention import check, packed

triton = pytest.importorskip("ecar_kernels.stage_attention.triton")
pytestmark = pytest.mark.usefixtures("products_sum_in_order")


def test_one_key_s_gradients_are_rounding_alone():
    call = packed((1,), batch=2, head_dim=72)
    _, grad_q, grad_k, grad_v = run(
        triton.stage_attention, call, None, [torch.randn_like(call["q"])]
    )
    assert max(grad_q.abs().max(), grad_k.abs().max()) <= 1e-5 and grad_v.all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "stages, queries",
    [
        ((2,), 2),
        ((1, 1), 2),
        ((1, 3), 4),
        ((7,), 7),  # few keys
        ((20,), 20),
        ((16, 4), 4),
        ((4, 14, 27), 41),  # more than a block
    ],
    ids=str,
)
def test_queries_that_resemble_a_key(stages, queries, dtype, monkeypatch):
    """Its score is about 8, and that of others about 0.

    At least 32 queries: of 8, the mean error is so random that one run in some hundreds fails.
    """
    monkeypatch.setattr(launch, "default", lambda *_: launch.Settings(16, 32, 4, 1))
    batch = min(8, max(2, 32 // queries))
    for head_dim, sign in ((64, 1), (72, -1)):
        call = packed(stages, queries=queries, batch=batch, heads=1, head_dim=head_dim, dtype=dtype)
        q = sign * call["k"][:, sum(stages) - queries :]
        check(call | {"q": q, "scale": sign * 8 / head_dim})


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("stages", [(2,), (3,), (1, 2), (9,), (22,)], ids=str)
def test_scores_far_apart(stages, dtype):
    for scale in (0.3, -0.3):
        check(packed(stages, batch=2, head_dim=96, dtype=dtype) | {"scale": scale})


def test_weights_that_sum_to_nearly_one():
    """As where a score is rounded once on its way into the logsumexp, and not in a weight."""

    def ours(q, k, v, grad):
        out, lse, rest = triton._training(q, k, v, (1, 1), 0.3)
        lse = lse + torch.empty_like(lse).uniform_(-5e-7, 5e-7)
        return triton._backward(grad, q, k, v, out, lse, rest, (1, 1), 0.3)[:2]

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_rounding_took_from_the_output_is_kept(dtype):
    q, k, v, stages = packed((4, 20), head_dim=72, dtype=dtype).values()
    out, _, rest = triton._training(q, k, v, stages, 0.0)  # equal weights, which are not rounded
    exact = reference.stage_attention(q.double(), k.double(), v.double(), stages, scale=0.0)
    assert out.dtype == rest.dtype == dtype
    left = (out.double() + rest.double() - exact).abs().max()
    assert left <= (torch.finfo(dtype).eps ** 2 + 1e-6) * exact.abs().max()

"""PyTorch's own attentions, told the mask, meet the rule that our backends meet: all agree."""

import functools
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ecar_kernels import _triton, stage_attention, use_backend
from ecar_kernels.stage_attention import reference
from tests.support.accuracy import assert_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VAR = (1, 4, 9, 16, 25, 36, 64, 100, 169, 256)
ECAR = (16, 64, 256)
CASES = [(VAR, 680), (VAR, 425), (ECAR, 336), (ECAR, 256)]


def masked(q, k, v, stage_lengths):
    """scaled_dot_product_attention with an explicit mask."""
    mask = reference.block_causal_mask(stage_lengths, q.shape[1], device=q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def flex(q, k, v, stage_lengths, attend=flex_attention):
    """FlexAttention with a block mask, not compiled."""
    queries, keys = q.shape[1], k.shape[1]
    ends = torch.tensor(tuple(itertools.accumulate(stage_lengths)), device=q.device)
    stage = torch.bucketize(torch.arange(keys, device=q.device), ends, right=True)

    def may_see(batch, head, query, key):
        return stage[query + keys - queries] >= stage[key]

    mask = create_block_mask(may_see, None, None, queries, keys, device=q.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return attend(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


def ours(backend):
    def attend(**call):
        with use_backend(backend):
            return stage_attention(**call)

    return attend


def packed(stages, queries, head_dim=8):
    q, k, v = torch.randn(1, sum(stages), 3, 2, head_dim, device=DEVICE).unbind(2)
    return {"q": q[:, sum(stages) - queries :], "k": k, "v": v, "stage_lengths": stages}


needs_triton = pytest.mark.skipif(_triton.why_not() is not None, reason=str(_triton.why_not()))
EVERYONE = {
    "masked": pytest.param(masked, id="masked"),
    "flex": pytest.param(flex, id="flex"),
    # What serves without Triton.
    "plain": pytest.param(ours("cpp" if DEVICE == "cpu" else "sdpa"), id="plain"),
    "triton": pytest.param(ours("triton"), id="triton", marks=needs_triton),
}


@pytest.mark.parametrize("attend", EVERYONE.values())
@pytest.mark.parametrize(("stages", "queries"), CASES)
def test_all_agree(stages, queries, attend):
    assert_accurate(attend, reference.stage_attention, packed(stages, queries))


@pytest.mark.parametrize("attend", [EVERYONE[name] for name in ("masked", "plain", "triton")])
def test_gradients_agree(attend):
    assert_accurate(attend, reference.stage_attention, packed(VAR[:6], 91), gradients=True)


@pytest.fixture
def fresh_graphs():
    torch._dynamo.reset()


# torch's FlexAttention has no backward on the CPU.
@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("stages", "queries"), CASES)
def test_compiled_flex_attention_agrees(stages, queries, gradients, fresh_graphs):
    """It takes heads of 16 dimensions or more."""
    compiled = torch.compile(flex_attention, fullgraph=True)
    assert_accurate(
        functools.partial(flex, attend=compiled),
        reference.stage_attention,
        packed(stages, queries, 16),
        gradients=gradients,
    )


@pytest.mark.parametrize("attend", [EVERYONE[name] for name in ("plain", "triton")])
def test_inductor_s_full_graph_is_ours(attend, fresh_graphs):
    call = packed(ECAR, 256)
    inputs = [call[name].requires_grad_() for name in "qkv"]
    grad = torch.randn_like(call["q"])
    runs = []
    for function in (torch.compile(attend, fullgraph=True), attend):
        out = function(**call)
        runs.append((out, *torch.autograd.grad(out, inputs, grad)))
    for compiled, eager in zip(*runs, strict=True):
        assert compiled.equal(eager)

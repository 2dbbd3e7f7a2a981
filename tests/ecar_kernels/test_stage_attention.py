"""Stage attention: the oracle against a loop, and every backend's outputs against the oracle.

Their gradients are judged in test_stage_attention_backward.py, their registered ops and graphs in
test_stage_attention_ops.py, and what is particular to Triton's launches in triton/.
"""

import functools
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ecar_kernels import stage_attention, use_backend
from ecar_kernels.registry import KERNEL_DTYPES
from ecar_kernels.stage_attention import reference
from tests.support.accuracy import assert_accurate, largest_error
from tests.support.backends import DEVICES, needs_triton
from tests.support.native import needs_native
from tests.support.stage_attention import E_CAR, HEAD_DIMS, VAR_STAGES, attend, call_of, check

CPP = pytest.param("cpp", marks=needs_native)
TRITON = pytest.param("triton", marks=needs_triton)
by_every_name = pytest.mark.parametrize("backend", ["reference", CPP, TRITON])


def test_the_oracle_is_a_softmax_over_the_stages_so_far():
    """Token by token, in float64."""
    stages = (1, 3, 2)
    call = call_of(stages, dtype=torch.float64)
    out = reference.stage_attention(**call)
    q, k, v = call["q"][0], call["k"][0], call["v"][0]
    token = 0
    for stage, length in enumerate(stages):
        seen = sum(stages[: stage + 1])
        for _ in range(length):
            for head in range(2):
                scores = [
                    q[token, head].dot(k[key, head]).item() / math.sqrt(8) for key in range(seen)
                ]
                weights = [math.exp(score) for score in scores]
                expected = sum(w * v[key, head] for key, w in enumerate(weights)) / sum(weights)
                torch.testing.assert_close(out[0, token, head], expected, rtol=1e-12, atol=1e-12)
            token += 1


def test_the_mask_is_block_causal():
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    mask = reference.block_causal_mask((1, 2, 1), 4)
    assert mask.equal(expected)
    assert reference.block_causal_mask((1, 2, 1), 3).equal(expected[1:])


def test_a_list_of_lengths_will_do():
    call = call_of((4, 9), batch=2)
    assert stage_attention(**call | {"stage_lengths": [4, 9]}).equal(stage_attention(**call))


# What holds for every backend.


@st.composite
def shapes(draw):
    stages = tuple(draw(st.lists(st.integers(1, 24), min_size=1, max_size=5)))
    newest = draw(st.integers(1, len(stages)))
    return {
        "stages": stages,
        "queries": sum(stages[-newest:]),
        "batch": draw(st.integers(0, 3)),
        "heads": draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from(HEAD_DIMS["sdpa"])),
    }


ONE_TOKEN = {"stages": (1,), "queries": 1, "batch": 1, "heads": 1, "head_dim": 8}


@pytest.mark.parametrize("backend", [CPP, "sdpa"])
@settings(max_examples=25)
@given(shapes(), st.sampled_from(KERNEL_DTYPES), st.integers(0, 2**32))
@example(ONE_TOKEN, torch.float32, 1)
@example(ONE_TOKEN | {"stages": (37,), "queries": 37, "head_dim": 72}, torch.bfloat16, 2)
@example(ONE_TOKEN | {"stages": E_CAR, "queries": 336, "head_dim": 72}, torch.float32, 3)
@example(ONE_TOKEN | {"stages": E_CAR, "queries": 256, "head_dim": 64}, torch.float16, 4)
def test_outputs(backend, shape, dtype, seed):
    torch.manual_seed(seed)
    check(backend, call_of(**shape, dtype=dtype), gradients=False)


@pytest.mark.parametrize("backend", [CPP, "sdpa", TRITON])
@pytest.mark.parametrize("queries", [680, 425, 256, 1])
def test_var_s_ten_stages(backend, queries):
    """Also a last stage of one token after VAR's largest."""
    stages = VAR_STAGES if queries > 1 else (*VAR_STAGES[::-1][:4], 1)
    heads, head_dim = (1, 64) if backend == "triton" else (2, 8)
    call = call_of(stages, queries, heads=heads, head_dim=head_dim, backend=backend)
    check(backend, call, gradients=False)


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(6, 128), (16, 64), (16, 72)])
def test_the_models_stages(heads, head_dim, dtype):
    for stages in (E_CAR[:1], E_CAR[:2], E_CAR):
        call = call_of(stages, stages[-1], heads=heads, head_dim=head_dim, dtype=dtype)
        check("cpp", call, gradients=False)


@by_every_name
def test_suffix_queries_are_the_end_of_all_queries(backend):
    """What a KV cache computes is what training computed."""
    stages = VAR_STAGES[:6]
    call = call_of(stages, batch=2, backend=backend)
    with use_backend(backend):
        whole = stage_attention(**call)
        for newest in range(1, 7):
            queries = sum(stages[-newest:])
            part = stage_attention(**call | {"q": call["q"][:, -queries:]})
            torch.testing.assert_close(part, whole[:, -queries:], rtol=1e-5, atol=1e-6)


@by_every_name
def test_a_stage_does_not_see_later_stages(backend):
    call = call_of((4, 9, 16), batch=2, backend=backend)
    with use_backend(backend):
        before = stage_attention(**call)
        changed = call | {
            name: torch.cat((call[name][:, :13], torch.randn_like(call[name][:, 13:])), 1)
            for name in ("k", "v")
        }
        after = stage_attention(**changed)
    assert after[:, :13].equal(before[:, :13])
    assert largest_error(after[:, 13:], before[:, 13:].double()) > 0.1


@by_every_name
def test_scale(backend):
    call = call_of((4, 9), batch=2, backend=backend)
    with use_backend(backend):
        scaled = stage_attention(**call, scale=0.5)
        expected = stage_attention(**call | {"q": call["q"] * 0.5 * math.sqrt(8)})
    torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=1e-6)


@needs_native
def test_exponentials_are_exact_to_a_few_units():
    """Of two keys' weights the second is 2^-x of the first; all others vanish."""
    x = torch.cat([torch.linspace(1e-3, 120, 30000), torch.logspace(-3, 2, 1000)])
    q, k, v = torch.zeros(3, 1, len(x), 1, 2)
    q[0, :, 0, 0] = x
    k[..., 0] = -1e6
    k[0, :2, 0, 0] = torch.tensor([0.0, -1.0])
    v[0, :2, 0] = torch.eye(2)
    first, second = attend("cpp")(q, k, v, (len(x),), scale=math.log(2))[0, :, 0].T
    error = (second.double() / first.double() / torch.exp2(-x.double()) - 1).abs()
    # The scaled x is rounded too.
    assert (error <= (4 + 2 * x) * 2**-24).all()


@needs_native
def test_large_scores_do_not_overflow():
    call = call_of((4, 90), heads=1, head_dim=40)
    call["q"] = call["q"] * 1e4
    # Where the largest score is far ahead its key's value is the output, exactly. The rule would
    # judge chance: of the few rows where two are close, how the scores themselves were rounded.
    scores = torch.einsum("bqhd,bkhd->bqk", call["q"].double(), call["k"].double())[0, 4:]
    (first, second), (best, _) = (x.T for x in scores.topk(2))
    clear = first - second > 2000
    assert clear.sum() > 40
    out = attend("cpp")(**call)[0, 4:, 0]
    assert out[clear].equal(call["v"][0, best[clear], 0])
    huge = call | {"q": call["q"] * 1e14, "k": call["k"] * 1e14}
    assert attend("cpp")(**huge).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(20, 30), (21, 29), (1, 49)])  # bfloat16 pairs the keys
@needs_native
def test_what_is_not_finite_stays_with_who_sees_it(bad, dtype, lengths):
    call, first = call_of(lengths, heads=2, head_dim=24, dtype=dtype), lengths[0]
    clean = attend("cpp")(**call)
    broken = call | {"q": call["q"].clone()}
    broken["q"][0, 33, 1, 5] = bad
    out = attend("cpp")(**broken)
    assert not out[0, 33, 1].isfinite().any()
    out[0, 33, 1] = clean[0, 33, 1]
    assert out.equal(clean)
    for name, value, columns in (("k", math.nan, slice(None)), ("v", bad, 3)):
        for key in (first, 27):
            broken = call | {name: call[name].clone()}
            broken[name][0, key, 0, 3] = value
            out = attend("cpp")(**broken)
            assert not out[0, first:, 0, columns].isfinite().any()
            assert out[0, :first].equal(clean[0, :first]) and out[0, :, 1].equal(clean[0, :, 1])


@needs_native
def test_a_query_is_the_same_bits_alone_and_with_others():
    """Of an image, a head and a suffix: the sums know nothing of what else is computed."""
    call = call_of((7, 60, 150), batch=2, heads=3, head_dim=40)
    whole = attend("cpp")(**call)
    for newest, queries in ((1, 150), (2, 210)):
        part = attend("cpp")(**call | {"q": call["q"][:, -queries:]})
        assert part.equal(whole[:, -queries:]), newest
    for image in range(2):
        for head in range(3):
            alone = {name: call[name][image : image + 1, :, head : head + 1] for name in "qkv"}
            assert attend("cpp")(**call | alone).equal(whole[image : image + 1, :, head : head + 1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_sdpa_on_a_gpu(dtype):
    for head_dim in HEAD_DIMS["sdpa"]:
        call = call_of(E_CAR, batch=2, head_dim=head_dim, dtype=dtype)
        call |= {name: call[name].cuda() for name in "qkv"}
        check("sdpa", call, gradients=False)


# PyTorch's own attentions, told the mask, meet the rule that our backends meet: all agree.


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


def named(backend):
    def attend(**call):
        with use_backend(backend):
            return stage_attention(**call)

    return attend


# What serves without Triton, and Triton's kernels, with which they run on the GPU if there is one.
PLAIN = "cpp" if DEVICES["triton"] == "cpu" else "sdpa"
EVERYONE = {
    "masked": pytest.param(masked, id="masked"),
    "flex": pytest.param(flex, id="flex"),
    "plain": pytest.param(named(PLAIN), id="plain"),
    "triton": pytest.param(named("triton"), id="triton", marks=needs_triton),
}
CASES = [(VAR_STAGES, 680), (VAR_STAGES, 425), (E_CAR, 336), (E_CAR, 256)]


@pytest.mark.parametrize("attend", EVERYONE.values())
@pytest.mark.parametrize(("stages", "queries"), CASES)
def test_all_agree(stages, queries, attend):
    call = call_of(stages, queries, backend="triton")
    assert_accurate(attend, reference.stage_attention, call)


@pytest.mark.parametrize("attend", [EVERYONE[name] for name in ("masked", "plain", "triton")])
def test_gradients_agree(attend):
    call = call_of(VAR_STAGES[:6], 91, backend="triton")
    assert_accurate(attend, reference.stage_attention, call, gradients=True)


# torch's FlexAttention has no backward on the CPU.
@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("stages", "queries"), CASES)
def test_compiled_flex_attention_agrees(stages, queries, gradients):
    """It takes heads of 16 dimensions or more."""
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, fullgraph=True)
    assert_accurate(
        functools.partial(flex, attend=compiled),
        reference.stage_attention,
        call_of(stages, queries, head_dim=16, backend="triton"),
        gradients=gradients,
    )

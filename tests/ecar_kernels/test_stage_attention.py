"""Stage attention: the oracle against a loop, and every backend here against the oracle."""

import importlib
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ecar_kernels import stage_attention, use_backend
from ecar_kernels.registry import KERNEL_DTYPES
from ecar_kernels.stage_attention import reference
from tests.support.accuracy import assert_accurate, largest_error
from tests.support.native import needs_native

VAR_STAGES = (1, 4, 9, 16, 25, 36, 64, 100, 169, 256)
HEAD_DIMS = (8, 40, 64, 72, 80, 128, 256)


def packed(stages, *, queries=None, batch=2, heads=2, head_dim=8, dtype=torch.float32, seed=0):
    """q, k, v as views of one packed projection; q of the newest `queries` tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, sum(stages), 3, heads, head_dim, generator=generator).to(dtype)
    q, k, v = x.unbind(2)
    queries = sum(stages) if queries is None else queries
    return {"q": q[:, sum(stages) - queries :], "k": k, "v": v, "stage_lengths": stages}


def test_the_oracle_is_a_softmax_over_the_stages_so_far():
    """Token by token, in float64."""
    stages = (1, 3, 2)
    call = packed(stages, batch=1, dtype=torch.float64)
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


@st.composite
def shapes(draw):
    stages = tuple(draw(st.lists(st.integers(1, 24), min_size=1, max_size=5)))
    newest = draw(st.integers(1, len(stages)))
    return {
        "stages": stages,
        "queries": sum(stages[-newest:]),
        "batch": draw(st.integers(0, 3)),
        "heads": draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from(HEAD_DIMS)),
    }


ONE_TOKEN = {"stages": (1,), "queries": 1, "batch": 1, "heads": 1, "head_dim": 8}


def attend(backend):
    return importlib.import_module(f"ecar_kernels.stage_attention.{backend}").stage_attention


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_native), "sdpa"])
@settings(max_examples=25)
@given(shapes(), st.sampled_from(KERNEL_DTYPES), st.integers(0, 2**32))
@example(ONE_TOKEN, torch.float32, 1)
@example(ONE_TOKEN | {"stages": (37,), "queries": 37, "head_dim": 72}, torch.bfloat16, 2)
@example(ONE_TOKEN | {"stages": (16, 64, 256), "queries": 336, "head_dim": 72}, torch.float32, 3)
@example(ONE_TOKEN | {"stages": (16, 64, 256), "queries": 256, "head_dim": 64}, torch.float16, 4)
def test_a_backend_is_as_accurate_as_the_reference(backend, shape, dtype, seed):
    call = packed(**shape, dtype=dtype, seed=seed)
    assert_accurate(attend(backend), reference.stage_attention, call)


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_native), "sdpa"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_gradients_are_as_accurate(backend, dtype, seed):
    for queries in (29, 25, 16):
        call = packed((4, 9, 16), queries=queries, head_dim=40, dtype=dtype, seed=seed)
        assert_accurate(attend(backend), reference.stage_attention, call, gradients=True)


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_native), "sdpa"])
@pytest.mark.parametrize("queries", [680, 425, 256])
def test_var_s_ten_stages(backend, queries, seed):
    call = packed(VAR_STAGES, queries=queries, batch=1, seed=seed)
    assert_accurate(attend(backend), reference.stage_attention, call)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_native)])
def test_suffix_queries_are_the_end_of_all_queries(backend, seed):
    """What a KV cache computes is what training computed."""
    with use_backend(backend):
        whole = stage_attention(**packed(VAR_STAGES[:6], seed=seed))
        for newest in range(1, 7):
            queries = sum(VAR_STAGES[6 - newest : 6])
            part = stage_attention(**packed(VAR_STAGES[:6], queries=queries, seed=seed))
            torch.testing.assert_close(part, whole[:, -queries:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_native)])
def test_a_stage_does_not_see_later_stages(backend, seed):
    call = packed((4, 9, 16), seed=seed)
    with use_backend(backend):
        before = stage_attention(**call)
        changed = call | {
            name: torch.cat((call[name][:, :13], torch.randn(2, 16, 2, 8)), 1)
            for name in ("k", "v")
        }
        after = stage_attention(**changed)
    assert after[:, :13].equal(before[:, :13])
    assert largest_error(after[:, 13:], before[:, 13:].double()) > 0.1


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_native)])
def test_scale(backend, seed):
    call = packed((4, 9), seed=seed)
    with use_backend(backend):
        scaled = stage_attention(**call, scale=0.5)
        expected = stage_attention(**call | {"q": call["q"] * 0.5 * math.sqrt(8)})
    torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=1e-6)


def test_a_list_of_lengths_will_do(seed):
    call = packed((4, 9), seed=seed)
    assert stage_attention(**call | {"stage_lengths": [4, 9]}).equal(stage_attention(**call))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_sdpa_on_a_gpu(dtype, seed):
    for head_dim in HEAD_DIMS:
        call = packed((16, 64, 256), head_dim=head_dim, dtype=dtype, seed=seed)
        call |= {name: call[name].cuda() for name in "qkv"}
        assert_accurate(attend("sdpa"), reference.stage_attention, call)

"""Stage attention in C++: the accuracy rule in every layout, bits, memory, graphs."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecar_kernels.registry import KERNEL_DTYPES
from ecar_kernels.stage_attention import reference
from tests.support.accuracy import assert_accurate
from tests.support.native import needs_native

pytestmark = needs_native
cpp = pytest.importorskip("ecar_kernels.stage_attention.cpp", exc_type=ImportError)

VAR_STAGES = (1, 4, 9, 16, 25, 36, 64, 100, 169, 256)
E_CAR = (16, 64, 256)
# Whole vectors of each instruction set, parts of them, and one element.
HEAD_DIMS = (1, 3, 8, 13, 16, 33, 40, 64, 72, 80, 100, 128, 200, 256)


def tensor(batch, tokens, heads, head_dim, dtype=torch.float32, layout="contiguous"):
    """Random [batch, tokens, heads, head_dim] in memory as asked."""

    def normal(*shape):
        return torch.randn(*shape).to(dtype)

    if layout == "packed":
        return normal(batch, tokens, 3, heads, head_dim)[:, :, 1]
    if layout == "heads first":
        return normal(batch, heads, tokens, head_dim).transpose(1, 2)
    if layout == "tokens first":
        return normal(tokens, batch, heads, head_dim).transpose(0, 1)
    if layout == "sliced":
        return normal(batch + 1, 2 * tokens, heads + 1, head_dim + 3)[1:, ::2, 1:, 2:-1]
    if layout == "one head":
        return normal(batch, tokens, 1, head_dim).expand(-1, -1, heads, -1)
    if layout == "one image":
        return normal(1, tokens, heads, head_dim).expand(batch, -1, -1, -1)
    return normal(batch, tokens, heads, head_dim)


LAYOUTS = ("contiguous", "packed", "heads first", "tokens first", "sliced", "one head", "one image")


def call_of(
    stages,
    newest=None,
    *,
    batch=1,
    heads=2,
    head_dim=8,
    dtype=torch.float32,
    layouts=("contiguous",) * 3,
):
    queries = sum(stages if newest is None else stages[-newest:])
    return {
        name: tensor(batch, tokens, heads, head_dim, dtype, layout)
        for name, tokens, layout in zip(
            "qkv", (queries, sum(stages), sum(stages)), layouts, strict=True
        )
    } | {"stage_lengths": stages}


def check(call, *, gradients=True):
    assert_accurate(cpp.stage_attention, reference.stage_attention, call, gradients=gradients)


def backward(call, *, scale=None):
    """The outputs and the gradients of q, k and v, for random gradients of the outputs."""
    inputs = [call[name].detach().requires_grad_() for name in "qkv"]
    out = cpp.stage_attention(*inputs, call["stage_lengths"], scale=scale)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out.dtype)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad))


@st.composite
def calls(draw):
    stages = tuple(draw(st.lists(st.integers(1, 70), min_size=1, max_size=5)))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    call = call_of(
        stages,
        draw(st.integers(1, len(stages))),
        batch=draw(st.integers(0, 3)),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from(HEAD_DIMS)),
        dtype=draw(st.sampled_from(KERNEL_DTYPES)),
        layouts=[draw(st.sampled_from(LAYOUTS)) for _ in range(3)],
    )
    # About the usual one: where one of a few keys has all the weight, only rounding is left. Of
    # equal weights all queries have the same result: too few numbers to judge in narrow heads.
    equal = [0.0] if call["q"].shape[-1] >= 8 else []
    scale = draw(st.sampled_from([None, 1.2, -0.6, *equal]))
    return call | {"scale": scale and scale * call["q"].shape[-1] ** -0.5}


@settings(max_examples=60)
@given(calls())
def test_any_call(call):
    # Keys that are alike, or a scale of 0, leave of a gradient only its rounding. The rule is about
    # a root mean square: of a few numbers it judges chance.
    check(call, gradients=call["scale"] != 0 and call["q"].numel() >= 256)


@pytest.mark.parametrize("stages", [(2,), (3,), (1, 2)], ids=str)
def test_gradients_of_a_few_keys(stages):
    """What a rounding of the weights' gradients leaves in their difference from their mean."""
    for _ in range(20):
        check(call_of(stages, batch=2, head_dim=256))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("stages", [(2,), (1, 3), (20,), (16, 4), (30, 70)], ids=str)
def test_queries_that_resemble_a_key(stages, dtype):
    """Which has nearly all the weight then: a gradient is small beside the terms of its sum."""
    for _ in range(10):
        call = call_of(stages, 1, batch=2, head_dim=64, dtype=dtype)
        check(call | {"q": call["k"][:, -stages[-1] :], "scale": 1 / 8})


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_class_of_head_dim(head_dim, dtype):
    check(call_of((1, 5, 49), head_dim=head_dim, dtype=dtype))
    check(call_of((3, 130, 20), 1, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(6, 128), (16, 64), (16, 72)])
def test_the_models_stages(heads, head_dim, dtype):
    for stages in (E_CAR[:1], E_CAR[:2], E_CAR):
        check(call_of(stages, 1, heads=heads, head_dim=head_dim, dtype=dtype), gradients=False)
    check(call_of(E_CAR, heads=2, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("newest", [10, 3, 1])
def test_var_s_ten_stages(newest):
    check(call_of(VAR_STAGES, newest, head_dim=64))


def test_one_token_stages():
    check(call_of((1,) * 5, batch=2))
    check(call_of((1, 3, 1), 1))
    check(call_of((200, 1), 1, head_dim=40))


def test_one_key_has_weight_one():
    """Its value is the output, and no gradient reaches the score: exactly."""
    call = call_of((1,), heads=3, head_dim=72)
    out, grad_q, grad_k, _ = backward(call)
    assert out.equal(call["v"])
    assert not grad_q.any() and not grad_k.any()


@pytest.mark.parametrize("keys", [127, 128, 129, 255, 256, 257, 385, 1100])
def test_pieces_of_keys(keys):
    """Around the number whose scores are held at a time."""
    check(call_of((keys - 17, 17), head_dim=16))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 97])
def test_blocks_of_queries(count):
    check(call_of((5, count), 1, head_dim=24))


def test_exponentials_are_exact_to_a_few_units():
    """Of two keys' weights the second is 2^-x of the first; all others vanish."""
    x = torch.cat([torch.linspace(1e-3, 120, 30000), torch.logspace(-3, 2, 1000)])
    q, k, v = torch.zeros(3, 1, len(x), 1, 2)
    q[0, :, 0, 0] = x
    k[..., 0] = -1e6
    k[0, :2, 0, 0] = torch.tensor([0.0, -1.0])
    v[0, :2, 0] = torch.eye(2)
    first, second = cpp.stage_attention(q, k, v, (len(x),), scale=math.log(2))[0, :, 0].T
    error = (second.double() / first.double() / torch.exp2(-x.double()) - 1).abs()
    # The scaled x is rounded too.
    assert (error <= (4 + 2 * x) * 2**-24).all()


def test_large_scores_do_not_overflow():
    call = call_of((4, 90), heads=1, head_dim=40)
    call["q"] = call["q"] * 1e4
    # Where the largest score is far ahead its key's value is the output, exactly. The rule would
    # judge chance: of the few rows where two are close, how the scores themselves were rounded.
    scores = torch.einsum("bqhd,bkhd->bqk", call["q"].double(), call["k"].double())[0, 4:]
    (first, second), (best, _) = (x.T for x in scores.topk(2))
    clear = first - second > 2000
    assert clear.sum() > 40
    out = cpp.stage_attention(**call)[0, 4:, 0]
    assert out[clear].equal(call["v"][0, best[clear], 0])
    huge = call | {"q": call["q"] * 1e14, "k": call["k"] * 1e14}
    assert cpp.stage_attention(**huge).isfinite().all()


def test_weights_far_below_the_largest_are_no_nan():
    call = call_of((150,), heads=1, head_dim=16)
    call["k"][:, :140] *= 1e6
    for result in backward(call):
        assert result.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_with_who_sees_it(bad):
    call = call_of((20, 30), heads=2, head_dim=24)
    clean = cpp.stage_attention(**call)
    broken = call | {"q": call["q"].clone()}
    broken["q"][0, 33, 1, 5] = bad
    out = cpp.stage_attention(**broken)
    assert not out[0, 33, 1].isfinite().any()
    out[0, 33, 1] = clean[0, 33, 1]
    assert out.equal(clean)
    broken = call | {"k": call["k"].clone()}
    broken["k"][0, 27, 0, 3] = math.nan
    out = cpp.stage_attention(**broken)
    assert out[0, 20:, 0].isnan().all()
    assert out[0, :20].equal(clean[0, :20]) and out[0, :, 1].equal(clean[0, :, 1])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_nothing_beyond_the_views_is_read(dtype):
    """A preallocated KV cache, and heads out of a wider projection: the rest is nan."""
    stages, head_dim = (4, 18), 40

    def view(tokens, values=None):
        whole = torch.full((2, 32, 3, head_dim + 8), math.nan, dtype=dtype)
        part = whole[1:, 3 : tokens + 3, :2, 4 : head_dim + 4]
        return whole, part.copy_(torch.randn(part.shape) if values is None else values)

    call = {"q": view(18)[1], "k": view(22)[1], "v": view(22)[1], "stage_lengths": stages}
    check(call, gradients=False)
    assert all(result.isfinite().all() for result in backward(call))


def test_a_query_is_the_same_bits_alone_and_with_others():
    """Of an image, a head and a suffix: the sums know nothing of what else is computed."""
    call = call_of((7, 60, 150), batch=2, heads=3, head_dim=40)
    whole = cpp.stage_attention(**call)
    for newest, queries in ((1, 150), (2, 210)):
        part = cpp.stage_attention(**call | {"q": call["q"][:, -queries:]})
        assert part.equal(whole[:, -queries:]), newest
    for image in range(2):
        for head in range(3):
            alone = {name: call[name][image : image + 1, :, head : head + 1] for name in "qkv"}
            assert cpp.stage_attention(**call | alone).equal(
                whole[image : image + 1, :, head : head + 1]
            )


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 2), (3, 2)])
def test_any_number_of_threads_gives_the_same_bits(batch, heads, dtype):
    call = call_of((16, 64, 200), batch=batch, heads=heads, head_dim=72, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(backward(call))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        for result, other in zip(results[0], others, strict=True):
            assert result.equal(other)


def test_the_gradient_of_a_sum(seed):
    """It comes expanded from one number."""
    call = call_of((4, 9), head_dim=16)
    inputs = [call[name].requires_grad_() for name in "qkv"]
    found = torch.autograd.grad(cpp.stage_attention(**call).sum(), inputs)
    exact = torch.autograd.grad(reference.stage_attention(**call).sum(), inputs)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_training_keeps():
    """q, k and v themselves, the output, and one number for each query and head."""
    call = call_of(E_CAR, heads=4, head_dim=64)
    inputs = [call[name].requires_grad_() for name in "qkv"]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = cpp.stage_attention(**call)
    own = [x for x in kept if x.data_ptr() not in {x.data_ptr() for x in (*inputs, out)}]
    assert [tuple(x.shape) for x in own] == [(1, 4, 336)] and len(kept) == 5


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets(isa):
    """The accuracy rule again, in a process that is told to use the older one."""
    program = f"""
import torch
from ecar_kernels import _native
from ecar_kernels.registry import KERNEL_DTYPES
from tests.ecar_kernels.test_stage_attention_cpp import call_of, check
print(_native.instruction_set())
torch.manual_seed({torch.initial_seed() % 2**32})
for dtype in KERNEL_DTYPES:
    for head_dim in (3, 40, 72, 128):
        check(call_of((1, 20, 37), head_dim=head_dim, dtype=dtype))
        check(call_of((100, 70), 1, head_dim=head_dim, dtype=dtype))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"ECAR_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != isa:
        pytest.skip(f"this CPU has no {isa}")

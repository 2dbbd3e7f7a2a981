"""Stage attention's gradients: every backend's against the oracle's, by the accuracy rule."""

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
from ecar_kernels.testing import judge, middle
from tests.support.accuracy import run
from tests.support.backends import KERNELS, by_every_kernel
from tests.support.native import needs_native
from tests.support.stage_attention import (
    E_CAR,
    HEAD_DIMS,
    LAYOUTS,
    VAR_STAGES,
    attend,
    backward,
    call_of,
    check,
)


@st.composite
def calls(draw):
    stages = tuple(draw(st.lists(st.integers(1, 70), min_size=1, max_size=5)))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    call = call_of(
        stages,
        sum(stages[-draw(st.integers(1, len(stages))) :]),
        batch=draw(st.integers(0, 3)),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from(HEAD_DIMS["cpp"])),
        dtype=draw(st.sampled_from(KERNEL_DTYPES)),
        layouts=[draw(st.sampled_from(LAYOUTS)) for _ in range(3)],
    )
    # About the usual one: where one of a few keys has all the weight, only rounding is left. Of
    # equal weights all queries have the same result: too few numbers to judge in narrow heads.
    equal = [0.0] if call["q"].shape[-1] >= 8 else []
    scale = draw(st.sampled_from([None, 1.2, -0.6, *equal]))
    return call | {"scale": scale and scale * call["q"].shape[-1] ** -0.5}


@needs_native
@settings(max_examples=60)
@given(calls())
def test_any_call(call):
    # Keys that are alike, or a scale of 0, leave of a gradient only its rounding. The rule is about
    # a root mean square: of a few numbers it judges chance.
    check("cpp", call, gradients=call["scale"] != 0 and call["q"].numel() >= 256)


@pytest.mark.parametrize("backend", [KERNELS[0], "sdpa"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_suffixes(backend, dtype):
    for queries in (29, 25, 16):
        check(backend, call_of((4, 9, 16), queries, batch=2, head_dim=40, dtype=dtype))


@by_every_kernel
def test_suffix_gradients_reach_the_cached_stages(backend, small_tiles):
    call = call_of((4, 20, 17), 17, backend=backend)
    check(backend, call)
    leaves = {name: call[name].detach().requires_grad_() for name in "qkv"}
    attend(backend)(**call | leaves).sum().backward()
    assert (leaves["v"].grad[:, :24] != 0).all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("backend", "head_dim"),
    [
        pytest.param(*kernel.values, head_dim, marks=kernel.marks)
        for kernel in KERNELS
        for head_dim in HEAD_DIMS[kernel.values[0]]
    ],
)
def test_every_class_of_head_dim(backend, head_dim, dtype, small_tiles):
    kinds = {"head_dim": head_dim, "dtype": dtype, "backend": backend}
    if backend == "triton":
        check(backend, call_of((1, 20), heads=1, **kinds))
    else:
        check(backend, call_of((1, 5, 49), **kinds))
        check(backend, call_of((3, 130, 20), 20, **kinds))


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_the_models_stages(head_dim, dtype):
    check("cpp", call_of(E_CAR, head_dim=head_dim, dtype=dtype))


@needs_native
@pytest.mark.parametrize("queries", [680, 525, 256])
def test_var_s_ten_stages(queries):
    check("cpp", call_of(VAR_STAGES, queries, head_dim=64))


@by_every_kernel
def test_var_s_gradients(backend, small_tiles):
    check(backend, call_of(VAR_STAGES[:7], heads=1, backend=backend))


@by_every_kernel
def test_one_token_stages(backend, small_tiles):
    check(backend, call_of((1,) * 5, batch=2, backend=backend))
    check(backend, call_of((1, 3, 1), 1, backend=backend))
    check(backend, call_of((200, 1), 1, head_dim=40, backend=backend))


@needs_native
@pytest.mark.parametrize("keys", [127, 128, 129, 255, 256, 257, 385, 1100])
def test_pieces_of_keys(keys):
    """Around the number whose scores C++ holds at a time."""
    check("cpp", call_of((keys - 17, 17), head_dim=16))


@needs_native
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 97])
def test_blocks_of_queries(count):
    check("cpp", call_of((5, count), count, head_dim=24))


# Where one key has nearly all the weight: delta is that weight's gradient then, and what is left of
# their difference is judged.


@by_every_kernel
def test_one_key_has_weight_one(backend, products_sum_in_order):
    """Its value is the output, and of a score's gradient rounding is left: in C++, nothing."""
    call = call_of((1,), batch=2, heads=3, head_dim=72, backend=backend)
    weights = [torch.randn_like(call["q"])]
    out, grad_q, grad_k, grad_v = run(attend(backend), call, None, weights)
    assert backend == "triton" or out.equal(call["v"])
    limit = {"cpp": 0.0, "triton": 1e-5}[backend]
    assert max(grad_q.abs().max(), grad_k.abs().max()) <= limit and grad_v.all()


@pytest.mark.parametrize("stages", [(2,), (3,), (1, 2)], ids=str)
@by_every_kernel
def test_gradients_of_a_few_keys(backend, stages, products_sum_in_order):
    """What a rounding of the weights' gradients leaves in their difference from their mean: of so
    few values by the median of several draws."""

    def judgement():
        call = call_of(stages, batch=2, head_dim=256, backend=backend)
        return judge(attend(backend), reference.stage_attention, call, gradients=True)

    for verdict in middle([judgement() for _ in range(21 if backend == "cpp" else 5)]):
        assert verdict.ok, str(verdict)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("stages", "queries"),
    [
        ((2,), 2),
        ((1, 1), 2),
        ((1, 3), 3),
        ((1, 3), 4),
        ((7,), 7),  # few keys
        ((20,), 20),
        ((16, 4), 4),
        ((4, 14, 27), 41),  # more than a block
        ((30, 70), 70),
    ],
    ids=str,
)
@by_every_kernel
def test_queries_that_resemble_a_key(backend, stages, queries, dtype, products_sum_in_order):
    """Its score is about 8, and that of others about 0.

    At least 32 queries: of 8, the mean error is so random that one run in some hundreds fails.
    """
    kinds = {"dtype": dtype, "backend": backend, "batch": min(8, max(2, 32 // queries))}
    for _ in range(10 if backend == "cpp" else 1):
        for head_dim, sign in ((64, 1), (72, -1)):
            call = call_of(stages, queries, heads=1, head_dim=head_dim, **kinds)
            q = sign * call["k"][:, -queries:]
            check(backend, call | {"q": q, "scale": sign * 8 / head_dim})


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("stages", [(2,), (3,), (1, 2), (9,), (22,)], ids=str)
@by_every_kernel
def test_scores_far_apart(backend, stages, dtype, products_sum_in_order):
    for scale in (0.3, -0.3):
        call = call_of(stages, batch=2, head_dim=96, dtype=dtype, backend=backend)
        check(backend, call | {"scale": scale})


@needs_native
def test_weights_far_below_the_largest_are_no_nan():
    call = call_of((150,), heads=1, head_dim=16)
    call["k"][:, :140] *= 1e6
    for result in backward("cpp", call):
        assert result.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-30, 2])
@by_every_kernel
def test_any_scale(backend, scale, small_tiles):
    check(backend, call_of((3, 20), heads=1, backend=backend) | {"scale": scale})


# What is read, kept and written.


@by_every_kernel
def test_any_order_of_dimensions(backend, small_tiles):
    """And keys shared by heads and by images."""
    like = call_of((1,), backend=backend)["q"]
    q = torch.randn(24, 3, 2, 8, device=like.device).permute(2, 0, 1, 3)
    shared = torch.randn(24, 8, device=like.device)[None, :, None].expand(2, -1, 3, -1)
    assert shared.stride()[::2] == (0, 0)
    check(backend, {"q": q, "k": shared, "v": shared, "stage_lengths": (4, 20)})


@pytest.mark.parametrize("layout", ["sum", "transposed", "last dimension strided"])
@by_every_kernel
def test_any_gradient_layout(backend, layout, small_tiles):
    """That of a sum is one number, expanded."""
    call = call_of((3, 20), head_dim=16, backend=backend)
    inputs = [call[name].requires_grad_() for name in "qkv"]
    out = attend(backend)(**call)
    if layout == "sum":
        grad = torch.ones(1, device=out.device).expand(out.shape)
    elif layout == "transposed":
        grad = torch.randn_like(out.transpose(1, 2).contiguous()).transpose(1, 2)
    else:
        grad = torch.randn_like(out.transpose(1, 3).contiguous()).transpose(1, 3)
    found = torch.autograd.grad(out, inputs, grad)
    expected = torch.autograd.grad(reference.stage_attention(**call), inputs, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@by_every_kernel
def test_gradients_of_some_arguments(backend, small_tiles):
    call = call_of((3, 20), backend=backend)
    call["v"].requires_grad_()
    out = attend(backend)(**call)
    (found,) = torch.autograd.grad(out.square().sum(), [call["v"]])
    exact = reference.stage_attention(**call).square().sum()
    (expected,) = torch.autograd.grad(exact, [call["v"]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert attend(backend)(**call).equal(out)


@by_every_kernel
def test_an_empty_batch(backend):
    check(backend, call_of((4, 9), batch=0, backend=backend))


@by_every_kernel
def test_outputs_are_contiguous(backend, small_tiles):
    call = call_of((4, 9), 9, backend=backend)
    inputs = [call[name].requires_grad_() for name in "qkv"]
    out = attend(backend)(**call)
    for x in (out, *torch.autograd.grad(out.sum(), inputs)):
        assert x.is_contiguous()


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_nothing_beyond_the_views_is_read(dtype):
    """A preallocated KV cache, and heads out of a wider projection: the rest is nan."""
    stages, head_dim = (4, 18), 40

    def view(tokens):
        whole = torch.full((2, 32, 3, head_dim + 8), math.nan, dtype=dtype)
        part = whole[1:, 3 : tokens + 3, :2, 4 : head_dim + 4]
        return part.copy_(torch.randn(part.shape))

    call = {"q": view(18), "k": view(22), "v": view(22), "stage_lengths": stages}
    check("cpp", call, gradients=False)
    assert all(result.isfinite().all() for result in backward("cpp", call))


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("first", [1, 5, 51])
def test_a_later_stage_s_keys_do_not_reach_earlier_queries(first, dtype):
    """Not even if they are no numbers. Odd stages end amid a pair of keys, and of queries."""
    call = call_of((first, 20), head_dim=40, dtype=dtype)
    clean = backward("cpp", call)[:2]
    for name in "kv":
        call[name] = call[name].clone()
        call[name][:, first:] = math.nan
    for found, expected in zip(backward("cpp", call)[:2], clean, strict=True):
        assert found[:, :first].equal(expected[:, :first])


@needs_native
def test_what_training_keeps():
    """q, k and v themselves, the output, and one number for each query and head."""
    call = call_of(E_CAR, heads=4, head_dim=64)
    inputs = [call[name].requires_grad_() for name in "qkv"]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = attend("cpp")(**call)
    own = [x for x in kept if x.data_ptr() not in {x.data_ptr() for x in (*inputs, out)}]
    assert [tuple(x.shape) for x in own] == [(1, 4, 336)] and len(kept) == 5


@by_every_kernel
def test_the_same_bits_every_time(backend, small_tiles, programs_in_any_order):
    call = call_of((5, 20), head_dim=72, dtype=torch.bfloat16, backend=backend)
    for first, second in zip(backward(backend, call), backward(backend, call), strict=True):
        assert first.equal(second)


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 2), (3, 2)])
def test_any_number_of_threads_gives_the_same_bits(batch, heads, dtype):
    call = call_of((16, 64, 200), batch=batch, heads=heads, head_dim=72, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(backward("cpp", call))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        for result, other in zip(results[0], others, strict=True):
            assert result.equal(other)


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets(isa):
    """The accuracy rule again, in a process that is told to use the older one."""
    program = f"""
import torch
from ecar_kernels import _native
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.stage_attention import call_of, check
print(_native.instruction_set())
torch.manual_seed({torch.initial_seed() % 2**32})
for dtype in KERNEL_DTYPES:
    for head_dim in (3, 40, 72, 128):
        check("cpp", call_of((1, 20, 37), head_dim=head_dim, dtype=dtype))
        check("cpp", call_of((100, 70), 70, head_dim=head_dim, dtype=dtype))
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

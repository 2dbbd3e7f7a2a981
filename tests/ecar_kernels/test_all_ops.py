"""What holds for every op: gradients, views, empty batches, autocast, determinism."""

import inspect

import pytest
import torch

import ecar_kernels
from ecar_kernels import registry, use_backend
from ecar_kernels.registry import BACKENDS, KERNEL_DTYPES, OPS, RECORDS
from tests.support.accuracy import tensors
from tests.support.ops import (
    DIFFERENTIABLE,
    arguments,
    function,
    small_arguments,
    tensor_names,
    without_tokens,
)

WITH_TENSORS = tuple(op for op in OPS if tensor_names(op))
STEPS = tuple(op for op in OPS if "previous" in tensor_names(op))  # of solvers


@pytest.mark.parametrize("op", OPS)
def test_every_backend_has_the_public_signature(op):
    public = inspect.signature(function(op))
    assert all(p.annotation is not p.empty for p in public.parameters.values())
    for implementation in registry.IMPLEMENTATIONS[op].values():
        if implementation.missing() is not None:
            continue
        assert inspect.signature(implementation.function) == public


def test_every_op_is_public():
    assert set(OPS) <= set(ecar_kernels.__all__)
    assert all(function(op).__doc__ for op in OPS)


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradients_of_the_reference(op, optional):
    """For every floating tensor argument, numerically, in float64: forward and reverse mode,
    their batches, and second derivatives."""
    call = small_arguments(op, dtype=torch.float64, optional=optional)
    names = [name for name in tensor_names(op) if name in call]

    def of_tensors(*values):
        return function(op)(**call | dict(zip(names, values, strict=True)))

    with use_backend("reference"):
        inputs = [call[name].requires_grad_() for name in names]
        assert torch.autograd.gradcheck(of_tensors, inputs)
        assert torch.autograd.gradcheck(
            of_tensors,
            inputs,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            fast_mode=True,
        )
        assert torch.autograd.gradgradcheck(of_tensors, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_types_go_through(op, dtype):
    call = arguments(op, dtype=dtype)
    for result in tensors(function(op)(**call)):
        assert result.dtype == dtype
        assert result.isfinite().all()


@pytest.mark.parametrize("op", OPS)
def test_an_empty_batch(op):
    for optional in (True, False):
        call = arguments(op, batch=0, optional=optional)
        full = tensors(function(op)(**arguments(op, optional=optional)))
        for empty, usual in zip(tensors(function(op)(**call)), full, strict=True):
            assert empty.shape == (0, *usual.shape[1:])


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("empty", ["batch", "tokens"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_nothing(op, empty, backend):
    """No images or no tokens (heads of attention, rows of an image): zeros of the right shapes,
    of a sum, whose gradient has strides of 0, too."""
    call = arguments(op, batch=0) if empty == "batch" else without_tokens(op)
    if backend != "auto":
        found = registry.IMPLEMENTATIONS[op].get(backend)
        if found is None or found.why_not("cpu", torch.float32) is not None:
            return
    names = [name for name in tensor_names(op) if name in call]
    call |= {name: call[name].detach().requires_grad_(op in DIFFERENTIABLE) for name in names}
    with use_backend("reference"):
        expected = tensors(function(op)(**call))
    with use_backend(backend):
        results = tensors(function(op)(**call))
    assert [y.shape for y in results] == [y.shape for y in expected]
    if op in DIFFERENTIABLE:
        sum(y.sum() for y in results).backward()
        for name in names:
            assert call[name].grad.shape == call[name].shape and not call[name].grad.any()


@pytest.mark.parametrize("op", WITH_TENSORS)
def test_views_give_what_copies_give(op):
    """Padding around every dimension but the last one's stride."""
    call = arguments(op)
    contiguous_alone = {its.name for its in RECORDS[op].arguments if its.contiguous}
    padded = {}
    for name in tensor_names(op):
        if name in contiguous_alone:
            continue
        value = call[name]
        room = torch.randn([size + 2 for size in value.shape])
        view = room[tuple(slice(1, -1) for _ in value.shape)]
        view.copy_(value)
        padded[name] = view
    contiguous = {name: call[name].contiguous() for name in padded}
    before = {name: value.clone() for name, value in padded.items()}
    results = [tensors(function(op)(**call | them)) for them in (contiguous, padded)]
    for copied, viewed in zip(*results, strict=True):
        torch.testing.assert_close(viewed, copied, rtol=1e-6, atol=1e-6)
    assert all(padded[name].equal(value) for name, value in before.items())


@pytest.mark.parametrize("op", OPS)
def test_same_inputs_same_bits(op):
    call = arguments(op)
    for once, again in zip(
        tensors(function(op)(**call)), tensors(function(op)(**call)), strict=True
    ):
        assert once.equal(again)


@pytest.mark.parametrize("op", WITH_TENSORS)
def test_autocast(op):
    """Into the autocast type, as a product; or into the widest, as an addition. What may be of
    another type than the leading tensor (the boundary's state) keeps its own."""
    call = arguments(op)
    first = tensor_names(op)[0]
    mixed = call | {first: call[first].bfloat16()}
    target = {"low": torch.bfloat16, "widest": torch.float32}[RECORDS[op].autocast]
    kept = {its.name for its in RECORDS[op].arguments if its.either or its.like}
    expected = tensors(
        function(op)(
            **{
                name: value.to(target) if name in tensor_names(op) and name not in kept else value
                for name, value in mixed.items()
            }
        )
    )
    assert [result.dtype for result in expected] == (
        [torch.float32, target, torch.float32] if kept else [target] * len(expected)
    )
    with torch.autocast("cpu", torch.bfloat16):
        results = tensors(function(op)(**mixed))
        keywords_in_another_order = tensors(function(op)(**dict(reversed(mixed.items()))))
    for result, other, wanted in zip(results, keywords_in_another_order, expected, strict=True):
        assert result.dtype == wanted.dtype
        assert result.equal(wanted) and other.equal(wanted)
    with pytest.raises(TypeError):
        function(op)(**mixed)


def test_autocast_leaves_noise_alone():
    call = arguments("initial_noise")
    expected = ecar_kernels.initial_noise(**call)
    with torch.autocast("cpu", torch.bfloat16):
        assert ecar_kernels.initial_noise(**call).equal(expected)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradients_flow_through_autocast_in_float32(op):
    call = {
        name: value.detach().requires_grad_() if name in tensor_names(op) else value
        for name, value in arguments(op).items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        results = tensors(function(op)(**call))
    sum(result.float().square().sum() for result in results).backward()
    for name in tensor_names(op):
        assert call[name].grad.dtype == torch.float32
        assert call[name].grad.any()


@pytest.mark.parametrize("op", OPS)
def test_on_the_meta_device(op):
    """Shapes without data, for counting a model's cost."""
    call = arguments(op, optional=False)
    meta = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }
    if "device" in meta:
        meta["device"] = "meta"
    for result, usual in zip(
        tensors(function(op)(**meta)), tensors(function(op)(**call)), strict=True
    ):
        assert result.device.type == "meta"
        assert result.shape == usual.shape


@pytest.mark.parametrize("op", OPS)
def test_a_bound_implementation_is_the_op(op):
    call = arguments(op)
    run_bound = registry.resolve(op, device="cpu", dtype=torch.float32)
    for ours, public in zip(tensors(run_bound(**call)), tensors(function(op)(**call)), strict=True):
        assert ours.equal(public)


def steps(test):
    """By every backend that serves them here, in every dtype."""
    for name, values in (("op", STEPS), ("backend", BACKENDS), ("dtype", KERNEL_DTYPES)):
        test = pytest.mark.parametrize(name, values, ids=str)(test)
    return test


def step(op, backend, dtype):
    found = registry.IMPLEMENTATIONS[op].get(backend)
    if found is None or (reason := found.why_not("cpu", dtype)) is not None:
        pytest.skip("there is none" if found is None else reason)
    return found.function, arguments(op, dtype=dtype)


@steps
def test_a_number_in_a_tensor_is_the_number(op, backend, dtype):
    run, call = step(op, backend, dtype)
    call |= {"dt": 0.1, "ratio": 0.7, "guidance_scale": 1.3}
    for names in (("dt",), ("guidance_scale",), ("ratio",), ("dt", "guidance_scale", "ratio")):
        data = {name: torch.tensor(call[name]) for name in names}
        assert all(map(torch.equal, run(**call), run(**call | data)))


@steps
def test_a_history_of_ratio_0_is_an_euler_step(op, backend, dtype):
    run, call = step(op, backend, dtype)
    euler = {n: x for n, x in call.items() if n not in ("previous", "ratio", "return_velocity")}
    *expected, v = run(**euler, return_velocity=True)
    assert all(map(torch.equal, expected, tensors(run(**euler))))
    for ratio in (0, 0.0, torch.tensor(0.0)):
        assert all(map(torch.equal, (*expected, v), run(**call | {"ratio": ratio})))
    assert not expected[0].equal(run(**call)[0])

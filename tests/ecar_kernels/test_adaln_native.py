"""The adaLN family in C++: outputs and gradients by the accuracy rule, in every layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecar_kernels import adaln, use_backend
from ecar_kernels.adaln import reference
from ecar_kernels.registry import KERNEL_DTYPES, resolve
from tests.support.accuracy import assert_accurate, largest_error, run, ulp
from tests.support.adaln import LAYOUTS, MODULATION, call_of
from tests.support.native import needs_native

pytestmark = needs_native


def native(op):
    return resolve(op, device="cpu", dtype=torch.float32, backend="cpp")


@st.composite
def calls(draw, op, channels):
    three = {"min_size": 3, "max_size": 3}
    shape = (draw(st.integers(0, 4)), draw(st.integers(0, 40)), draw(channels))
    dtype = draw(st.sampled_from(KERNEL_DTYPES))
    layouts = draw(st.lists(st.sampled_from(LAYOUTS), min_size=8, max_size=8))
    broadcast = draw(st.lists(st.booleans(), **three))
    steps = draw(st.lists(st.sampled_from([None, "one", "rows"]), **three))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    return call_of(op, *shape, dtype, layouts, broadcast, steps)


@pytest.mark.parametrize("op", MODULATION)
@given(st.data())
def test_outputs(op, data):
    with torch.no_grad():
        assert_accurate(
            native(op), getattr(reference, op), data.draw(calls(op, st.integers(1, 150)))
        )


@pytest.mark.parametrize("op", MODULATION)
@given(st.data())
def test_gradients(op, data):
    """From 24 channels: the error of a sum into one or two numbers is a matter of luck."""
    call = data.draw(calls(op, st.integers(24, 150)))
    assert_accurate(native(op), getattr(reference, op), call, gradients=True)


@pytest.mark.parametrize("op", MODULATION)
@given(st.integers(1, 4), st.integers(1, 70), st.integers(1, 24), st.integers(0, 2**32))
def test_gradients_of_broadcast_parts_are_the_sums_of_whole_ones(op, batch, count, channels, seed):
    """To the error that a chain of 16 additions may have."""
    torch.manual_seed(seed)
    small = call_of(
        op,
        batch,
        count,
        channels,
        torch.float32,
        ["contiguous"] * 8,
        [False] * 3,
        ["one", "rows", "one"],
    )
    whole = {
        name: value if name.startswith("step_") else value.expand(batch, count, channels)
        for name, value in small.items()
    }
    weights = [
        torch.randn(batch, count, channels) for _ in range(2 if op == "gated_residual_adaln" else 1)
    ]
    found, terms = (
        dict(zip(small, run(native(op), call, None, weights)[len(weights) :], strict=True))
        for call in (small, whole)
    )
    for name, value in small.items():
        term = terms[name.removeprefix("step_")].double()
        dims = [d for d in range(3) if value.shape[d] < term.shape[d]]
        expected, size = (t.sum(dims, keepdim=True) if dims else t for t in (term, term.abs()))
        assert ((found[name] - expected).abs() <= 16 * 2**-24 * size).all(), name


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("op", MODULATION)
@pytest.mark.parametrize("channels", [768, 1024, 1152])
def test_the_models_widths(op, channels, dtype):
    for broadcast in (True, False):
        call = call_of(op, 2, 64, channels, dtype, ["chunk"] * 8, [broadcast] * 3, ["one"] * 3)
        assert_accurate(native(op), getattr(reference, op), call, gradients=True)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("op", MODULATION)
def test_gradients_of_some_arguments_only(op, dtype):
    """Each tensor alone: what is not asked for is not made, what is asked for is the same."""
    for broadcast in (True, False):
        call = call_of(
            op, 3, 21, 50, dtype, ["contiguous"] * 8, [broadcast] * 3, ["one", "rows", "one"]
        )

        def gradients(names, call=call):
            inputs = {
                name: value.clone().requires_grad_(name in names) for name, value in call.items()
            }
            outputs = native(op)(**inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            total = sum((y.float() * (i + 1)).sin().sum() for i, y in enumerate(outputs))
            total.backward()
            return {name: inputs[name].grad for name in inputs}

        every = gradients(tuple(call))
        assert all(value is not None for value in every.values())
        for name in call:
            alone = gradients((name,))
            assert alone[name].equal(every[name])
            assert all(alone[other] is None for other in call if other != name)


def test_a_gradient_for_one_output_of_two():
    call = call_of(
        "gated_residual_adaln", 2, 9, 33, torch.float32, ["contiguous"] * 8, [True] * 3, ["one"] * 3
    )
    assert_accurate(
        lambda **call: native("gated_residual_adaln")(**call)[1],
        lambda **call: reference.gated_residual_adaln(**call)[1],
        call,
        gradients=True,
    )
    inputs = {name: value.clone().requires_grad_() for name, value in call.items()}
    native("gated_residual_adaln")(**inputs)[0].sin().sum().backward()
    gated = {
        name: call[name].clone().requires_grad_() for name in ("x", "branch", "gate", "step_gate")
    }
    native("gated_residual")(**gated).sin().sum().backward()
    for name, value in inputs.items():
        assert value.grad.equal(gated[name].grad if name in gated else torch.zeros_like(value))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("value", [3000.0, 1e-3, -1e4])
def test_a_mean_far_from_zero(dtype, value):
    """Statistics in two passes; the oracle sees the same rounded x."""
    x = (torch.randn(2, 9, 200) + value).to(dtype)
    shift, scale = torch.randn(2, 2, 9, 200).to(dtype)
    assert_accurate(native("adaln"), reference.adaln, {"x": x, "shift": shift, "scale": scale})


def test_a_constant_row_is_the_shift():
    for value in (0.0, 1.0, -300.0):
        x = torch.full((1, 2, 37), value)
        shift = torch.randn(1, 2, 37)
        assert native("adaln")(x, shift, torch.randn(1, 2, 37)).equal(shift)


def test_one_channel():
    x, shift, scale = torch.randn(3, 2, 5, 1)
    assert native("adaln")(x, shift, scale).equal(shift)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_not_a_number_and_infinity_stay_in_their_row(dtype):
    x, shift, scale, gate, branch = torch.randn(5, 2, 4, 70).to(dtype)
    clean = native("gated_residual_adaln")(x, branch, gate, shift, scale)
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = x.clone()
        broken[1, 2, 69] = bad
        new_x, y = native("gated_residual_adaln")(broken, branch, gate, shift, scale)
        torch.testing.assert_close(new_x[1, 2, 69], broken[1, 2, 69], equal_nan=True)
        assert y[1, 2].isnan().all()
        for result, usual in zip((new_x, y), clean, strict=True):
            result[1, 2] = usual[1, 2]
            assert result.equal(usual)


def test_a_sixteen_bit_result_too_large_is_infinite():
    x = torch.full((1, 1, 20), 60000.0, dtype=torch.float16)
    result = native("gated_residual")(x, x, torch.ones_like(x))
    assert result.equal(torch.full_like(x, torch.inf))


def gradient_of(op):
    """The gradient of x as a function of the arguments, for the rule to differentiate."""

    def gradient(x, **modulation):
        x = x if x.requires_grad else x.clone().requires_grad_()
        return torch.autograd.grad(op(x, **modulation).sin().sum(), x, create_graph=True)[0]

    return gradient


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 29, 80])
def test_second_derivatives_are_accurate(channels, dtype):
    """Of rows wide enough that their deviation is not now and then near zero, and so many that
    the root mean square of a gradient is not a matter of chance."""
    x, shift, scale = torch.randn(3, 32, 24, channels).to(dtype)
    call = {"x": x, "shift": shift, "scale": scale[:, :1]}
    assert_accurate(
        gradient_of(native("adaln")), gradient_of(reference.adaln), call, gradients=True
    )


def test_gradients_of_sums_over_many_tokens_stay_accurate():
    """Blocks, then blocks in double: not one long chain of additions."""
    call = call_of(
        "adaln", 4, 3000, 17, torch.float32, ["contiguous"] * 8, [False] * 3, ["one"] * 3
    )
    assert_accurate(native("adaln"), reference.adaln, call, gradients=True)


def test_offsets_past_2_to_the_31():
    """An image 2^31 elements after the first, by its stride; the pages between stay untouched."""
    count = 2**31 + 4096
    storage = torch.empty(count, dtype=torch.bfloat16)
    far = storage.as_strided((2, 3, 64), (2**31, 64, 1))
    far.copy_(torch.randn(2, 3, 64))
    near = far.clone()
    shift, scale = torch.randn(2, 2, 3, 64).bfloat16()
    with use_backend("cpp"):
        assert adaln(far, shift, scale).equal(adaln(near, shift, scale))


@pytest.mark.parametrize("op", MODULATION)
def test_close_to_the_reference_in_plain_sight(op):
    """Not through the rule: a few ulp of float32."""
    call = call_of(op, 2, 16, 768, torch.float32, ["chunk"] * 8, [True] * 3, ["one"] * 3)
    results, expected = native(op)(**call), getattr(reference, op)(**call)
    for result, wanted in zip(
        *((y if isinstance(y, tuple) else (y,)) for y in (results, expected)), strict=True
    ):
        assert largest_error(result, wanted.double()) <= 4 * ulp(wanted.double(), torch.float32)

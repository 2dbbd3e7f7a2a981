"""The adaLN family: the references against the formulas, and the kernels against the references.

Gradients are judged in test_adaln_backward.py, and what is particular to the launches of Triton's
kernels is in triton/test_adaln_triton.py.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecar_kernels import adaln, gated_residual, gated_residual_adaln, use_backend
from ecar_kernels.adaln import reference
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.accuracy import assert_accurate, largest_error, run, tensors, ulp
from tests.support.adaln import MODULATION, call_of, calls
from tests.support.backends import DEVICES, by_every_kernel, kernel
from tests.support.native import needs_native
from tests.support.ops import arguments


def normalise(x, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def test_adaln_is_its_formula():
    x, shift, scale, step_shift, step_scale = arguments("adaln", dtype=torch.float64).values()
    expected = normalise(x) * (1 + scale + step_scale) + shift + step_shift
    y = reference.adaln(x, shift, scale, step_shift=step_shift, step_scale=step_scale)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    plain = reference.adaln(x, shift, scale, eps=0.5)
    torch.testing.assert_close(
        plain, normalise(x, 0.5) * (1 + scale) + shift, rtol=1e-12, atol=1e-12
    )


def test_gated_residual_is_its_formula():
    x, branch, gate, step_gate = arguments("gated_residual", dtype=torch.float64).values()
    y = reference.gated_residual(x, branch, gate, step_gate=step_gate)
    torch.testing.assert_close(y, x + (gate + step_gate) * branch, rtol=1e-14, atol=1e-14)


@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 90),
    st.sampled_from(KERNEL_DTYPES),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_both_in_one_pass_are_the_two_in_a_row(batch, tokens, channels, dtype, steps, seed):
    torch.manual_seed(seed)
    x, branch = torch.randn(2, batch, tokens, channels).to(dtype)
    gate, shift, scale = torch.randn(batch, tokens, 3 * channels).to(dtype).chunk(3, -1)
    a, b, c = torch.randn(3, 1, 1, channels).to(dtype) if steps else (None, None, None)
    new_x, y = gated_residual_adaln(
        x, branch, gate, shift, scale, step_gate=a, step_shift=b, step_scale=c
    )
    assert new_x.equal(gated_residual(x, branch, gate, step_gate=a))
    assert y.equal(adaln(new_x, shift, scale, step_shift=b, step_scale=c))


@pytest.mark.parametrize("op", MODULATION)
@pytest.mark.parametrize("rows", [1, 2])
def test_broadcast_modulation_is_the_expanded_one(op, rows):
    """[B, 1, C] spatial parts; step parts of the batch or of each row."""
    call = arguments(op, dtype=torch.float64)
    small = {
        name: torch.randn(rows if name.startswith("step_") else 2, 1, 24).double()
        for name in call
        if name not in ("x", "branch")
    }
    with use_backend("reference"):
        results = run(getattr(reference, op), call | small)
        expanded = {name: value.expand(2, 21, 24) for name, value in small.items()}
        expected = run(getattr(reference, op), call | expanded)
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("op", MODULATION)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_arithmetic_is_in_float32(op, dtype):
    """In 16 bits the result is the float64 one, rounded once; in float32, to a few ulp."""
    call = arguments(op, batch=4, dtype=dtype)
    results = run(getattr(reference, op), call)
    if op == "gated_residual_adaln":  # its y is of the rounded x
        call = {
            "x": results[0],
            **{
                name: value
                for name, value in call.items()
                if name in ("shift", "scale", "step_shift", "step_scale")
            },
        }
        results, op = results[1:], "adaln"
    oracles = run(getattr(reference, op), call, torch.float64)
    allowed = 8 if dtype == torch.float32 else 0.51
    for result, oracle in zip(results, oracles, strict=True):
        assert largest_error(result, oracle) <= allowed * ulp(oracle, dtype)


def test_statistics_survive_a_large_mean():
    """Two passes: E[x^2] - mean^2 would lose every digit here."""
    x = torch.randn(2, 5, 64) + 3000
    shift = scale = torch.zeros(2, 1, 64)
    with use_backend("reference"):
        y, oracle = adaln(x, shift, scale), adaln(x.double(), shift.double(), scale.double())
    assert largest_error(y, oracle) <= 4 * ulp(x, torch.float32)


@pytest.mark.parametrize("op", MODULATION)
def test_nothing_is_changed_in_place(op):
    call = arguments(op)
    before = {name: value.clone() for name, value in call.items()}
    run(getattr(reference, op), call)
    assert all(call[name].equal(value) for name, value in before.items())


# What holds for the kernels of every backend.


def call(op, backend, *shape, **kinds):
    return call_of(op, *shape, **kinds, device=DEVICES[backend])


def check(op, backend, arguments, *, gradients=True):
    assert_accurate(kernel(op, backend), getattr(reference, op), arguments, gradients=gradients)


@pytest.mark.parametrize("op", MODULATION)
@pytest.mark.parametrize("shape", [(0, 5, 24), (3, 0, 24), (0, 0, 24)])
@by_every_kernel
def test_nothing_to_do(op, shape, backend):
    """Sums over nothing are zeros."""
    arguments = call(op, backend, *shape, whole=(False,) * 3, steps=("one", "rows", "one"))
    outputs = len(tensors(getattr(reference, op)(**arguments)))
    weights = [torch.empty(shape, device=DEVICES[backend])] * outputs
    found = run(kernel(op, backend), arguments, None, weights)
    for value, like in zip(found[outputs:], arguments.values(), strict=True):
        assert value.equal(torch.zeros_like(like))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("value", [3000.0, 1e-3, -1e4])
@by_every_kernel
def test_a_mean_far_from_zero(dtype, value, backend):
    """Statistics in two passes; the reference in float64 sees the same rounded x."""
    arguments = call("adaln", backend, 2, 9, 200, dtype=dtype)
    arguments["x"] = (torch.randn(2, 9, 200, device=DEVICES[backend]) + value).to(dtype)
    check("adaln", backend, arguments, gradients=backend == "triton")


@by_every_kernel
def test_a_constant_row_is_the_shift(backend):
    for value in (0.0, 1.0, -300.0):
        x = torch.full((1, 2, 37), value, device=DEVICES[backend])
        shift, scale = torch.randn(2, 1, 2, 37, device=DEVICES[backend])
        assert kernel("adaln", backend)(x, shift, scale).equal(shift)


@by_every_kernel
def test_one_channel(backend):
    x, shift, scale = torch.randn(3, 2, 5, 1, device=DEVICES[backend])
    assert kernel("adaln", backend)(x, shift, scale).equal(shift)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@by_every_kernel
def test_not_a_number_and_infinity_stay_in_their_row(dtype, backend):
    arguments = call("gated_residual_adaln", backend, 2, 4, 70, dtype=dtype)
    both = kernel("gated_residual_adaln", backend)
    clean = both(**arguments)
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = arguments["x"].clone()
        broken[1, 2, 69] = bad
        new_x, y = both(**arguments | {"x": broken})
        torch.testing.assert_close(new_x[1, 2, 69], broken[1, 2, 69], equal_nan=True)
        assert y[1, 2].isnan().all()
        for result, usual in zip((new_x, y), clean, strict=True):
            result[1, 2] = usual[1, 2]
            assert result.equal(usual)


@by_every_kernel
def test_a_sixteen_bit_result_too_large_is_infinite(backend):
    x = torch.full((1, 1, 20), 60000.0, dtype=torch.float16, device=DEVICES[backend])
    found = kernel("gated_residual", backend)(x, x, torch.ones_like(x))
    assert found.equal(torch.full_like(x, torch.inf))


@by_every_kernel
def test_offsets_past_2_to_the_31(backend):
    """An image 2^31 elements after the first, by its stride; the pages between stay untouched."""
    device = DEVICES[backend]
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((2, 3, 64), (2**31, 64, 1))
    far.copy_(torch.randn(2, 3, 64))
    near = far.clone()
    shift, scale = torch.randn(2, 2, 3, 64, device=device).bfloat16()
    adaln = kernel("adaln", backend)
    assert adaln(far, shift, scale).equal(adaln(near, shift, scale))


# C++.


def cpp(op):
    return kernel(op, "cpp")


@needs_native
@pytest.mark.parametrize("op", MODULATION)
@given(st.data())
def test_outputs(op, data):
    with torch.no_grad():
        assert_accurate(cpp(op), getattr(reference, op), data.draw(calls(op, st.integers(1, 150))))


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("op", MODULATION)
@pytest.mark.parametrize("channels", [768, 1024, 1152])
def test_the_models_widths(op, channels, dtype):
    for broadcast in (True, False):
        call = call_of(op, 2, 64, channels, dtype, ["chunk"] * 8, [broadcast] * 3, ["one"] * 3)
        assert_accurate(cpp(op), getattr(reference, op), call, gradients=True)


@needs_native
@pytest.mark.parametrize("op", MODULATION)
def test_close_to_the_reference_in_plain_sight(op):
    """Not through the rule: a few ulp of float32."""
    call = call_of(op, 2, 16, 768, torch.float32, ["chunk"] * 8, [True] * 3, ["one"] * 3)
    results, expected = cpp(op)(**call), getattr(reference, op)(**call)
    for result, wanted in zip(
        *((y if isinstance(y, tuple) else (y,)) for y in (results, expected)), strict=True
    ):
        assert largest_error(result, wanted.double()) <= 4 * ulp(wanted.double(), torch.float32)

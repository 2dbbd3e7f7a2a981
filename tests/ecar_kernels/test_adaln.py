"""The adaLN family: the oracles against the formulas, and their accuracy in each type."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecar_kernels import adaln, gated_residual, gated_residual_adaln, use_backend
from ecar_kernels.adaln import reference
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.accuracy import largest_error, run, ulp
from tests.support.ops import arguments

FAMILY = ("adaln", "gated_residual", "gated_residual_adaln")


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


@pytest.mark.parametrize("op", FAMILY)
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


@pytest.mark.parametrize("op", FAMILY)
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


@pytest.mark.parametrize("op", FAMILY)
def test_nothing_is_changed_in_place(op):
    call = arguments(op)
    before = {name: value.clone() for name, value in call.items()}
    run(getattr(reference, op), call)
    assert all(call[name].equal(value) for name, value in before.items())

"""The fused GEMMs: the oracles against the formulas and against the ops they fuse."""

import pytest
import torch
import torch.nn.functional as F

from ecar_kernels import adaln_linear, linear_gated_residual, use_backend
from ecar_kernels.adaln import reference as unfused
from ecar_kernels.flow_block import reference
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.accuracy import assert_accurate
from tests.support.native import needs_native
from tests.support.ops import arguments

MODULATION = ("x", "shift", "scale", "step_shift", "step_scale")


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_adaln_linear_is_its_formula(activation):
    call = arguments("adaln_linear", dtype=torch.float64) | {"activation": activation}
    x, weight, bias = call["x"], call["weight"], call["bias"]
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    factor = call["scale_offset"] + call["scale"] + call["step_scale"]
    y = y * factor + call["shift"] + call["step_shift"]
    y = torch.einsum("bnc,kc->bnk", y, weight) + bias
    if activation:
        y = y / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    torch.testing.assert_close(reference.adaln_linear(**call), y, rtol=1e-11, atol=1e-11)


def test_linear_gated_residual_is_its_formula():
    call = arguments("linear_gated_residual", dtype=torch.float64)
    branch = torch.einsum("bnk,ck->bnc", call["h"], call["weight"]) + call["bias"]
    expected = call["residual"] + (call["gate"] + call["step_gate"]) * branch
    result = reference.linear_gated_residual(**call)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("optional", [True, False])
@torch.no_grad()
def test_fused_is_unfused(dtype, optional):
    call = arguments("adaln_linear", dtype=dtype, optional=optional)
    call |= {"activation": None, "scale_offset": 1.0}
    y = unfused.adaln(**{name: call[name] for name in MODULATION if name in call})
    assert reference.adaln_linear(**call).equal(F.linear(y, call["weight"], call["bias"]))
    call = arguments("linear_gated_residual", dtype=dtype, optional=optional)
    branch = F.linear(call["h"], call["weight"], call["bias"])
    expected = unfused.gated_residual(
        call["residual"], branch, call["gate"], step_gate=call.get("step_gate")
    )
    assert reference.linear_gated_residual(**call).equal(expected)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_native)])
def test_what_is_added_to_scale(backend):
    """scale_offset + scale is one number: the same bits for whichever part holds the 1, which is
    scale_offset where none is given."""
    call = arguments("adaln_linear") | {"scale_offset": 1.0}
    del call["step_scale"]  # which is added to scale first
    with use_backend(backend):
        expected = adaln_linear(**call)
        given = {"scale": 1 + call["scale"], "scale_offset": 0.0}
        assert adaln_linear(**call | given).equal(expected)
        del call["scale_offset"]
        assert adaln_linear(**call).equal(expected)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_native)])
def test_a_layer_norm_in_front_of_a_linear_layer(backend, dtype):
    """Its weight and bias, small and large, are scale and shift where scale_offset is 0."""

    def plain(x, shift, scale, weight, bias):
        return F.linear(F.layer_norm(x, x.shape[-1:], scale[0, 0], shift[0, 0], 1e-6), weight, bias)

    def fused(**call):
        with use_backend(backend):
            return adaln_linear(**call, scale_offset=0.0)

    for factor in (1e-3, 50):
        call = {
            "x": torch.randn(2, 21, 48),
            "shift": torch.randn(1, 1, 48).expand(2, 1, 48),
            "scale": factor * torch.randn(1, 1, 48).expand(2, 1, 48),
            "weight": torch.randn(70, 48),
            "bias": torch.randn(70),
        }
        assert_accurate(fused, plain, {name: value.to(dtype) for name, value in call.items()})


@pytest.mark.parametrize("op", [adaln_linear, linear_gated_residual])
def test_the_bias_may_be_none(op):
    call = arguments(op.__name__)
    without = op(**call | {"bias": None})
    torch.testing.assert_close(without, op(**call | {"bias": torch.zeros_like(call["bias"])}))

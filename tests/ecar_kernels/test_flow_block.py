"""The fused GEMMs: the references against the formulas and the ops they fuse, and the kernels of
every backend against the references.

Their registered ops and graphs are in test_flow_block_ops.py, a whole block in one call is in
test_flow_block_whole.py, packed weights are in test_packing.py, and what is particular to Triton's
launches is in triton/test_flow_block_triton.py.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from ecar_kernels import adaln_linear, linear_gated_residual, use_backend
from ecar_kernels.adaln import reference as unfused
from ecar_kernels.flow_block import reference
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.accuracy import assert_accurate
from tests.support.backends import DEVICES, by_every_kernel, kernel
from tests.support.flow_block import OPS, call_of, calls
from tests.support.native import needs_native
from tests.support.ops import arguments

# Interpreted, kernels compute in numpy, which warns where a GPU does not: of exp2's infinity, say.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning:triton"
)

MODULATION = ("x", "shift", "scale", "step_shift", "step_scale")


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_adaln_linear_is_its_formula(activation):
    call = arguments("adaln_linear", dtype=torch.float64)
    call |= {"activation": activation, "scale_offset": 0.5}
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
    call |= {"activation": None}
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


# What holds for the kernels of every backend.


def check(op, backend, call):
    assert_accurate(kernel(op, backend), getattr(reference, op), call)


@by_every_kernel
def test_gelu_is_exact_to_a_few_units(backend):
    """Of the result where it does not vanish, else of 1: torch's own cancels for x < 0."""
    dense = 10 if backend == "cpp" else 1  # Triton's kernels may be interpreted
    values = torch.cat(
        [
            torch.linspace(-20, 20, 4000 * dense + 1),
            torch.logspace(-30, 4, 100 * dense),
            -torch.logspace(-30, 4, 100 * dense),
            torch.tensor([0.0, -1e20, 1e20]),
        ]
    )
    device = DEVICES[backend]
    zeros = torch.zeros(1, 1, 8, device=device)
    weight = torch.zeros(len(values), 8, device=device)  # the product is 0: GELU of the bias
    found = kernel("adaln_linear", backend)(
        zeros, zeros, zeros, weight, values.to(device), activation="gelu_tanh"
    )[0, 0].cpu()
    exact = F.gelu(values.double(), approximate="tanh")
    error = (found.double() - exact).abs()
    units = 5 if backend == "cpp" else 8
    assert (error <= torch.where(values >= -1, units * exact.abs(), 1) * 2**-24).all()
    assert (error[(values < -15) & (values > -1e10)] < 1e-30).all()
    assert found[values > 10].equal(values[values > 10])


@pytest.mark.parametrize("op", OPS)
@by_every_kernel
def test_views_give_what_copies_give(op, backend):
    layouts = ("chunk", "transposed", "expanded", "sliced", "chunk", "transposed")
    call = call_of(
        op,
        3,
        7,
        80,
        40,
        layouts=layouts,
        sliced=True,
        steps=("rows", "rows"),
        device=DEVICES[backend],
    )
    copies = {
        name: value.contiguous() if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }
    assert kernel(op, backend)(**call).equal(kernel(op, backend)(**copies))


@pytest.mark.parametrize("op", OPS)
@by_every_kernel
def test_nothing_to_do(op, backend):
    for batch, count, outputs in ((0, 5, 8), (2, 0, 8), (2, 5, 0)):
        call = call_of(op, batch, count, 24, outputs, device=DEVICES[backend])
        assert kernel(op, backend)(**call).shape == (batch, count, outputs)


@by_every_kernel
def test_no_inputs(backend):
    """What is left is the bias."""
    call = call_of("linear_gated_residual", 2, 5, 0, 8, device=DEVICES[backend])
    found = kernel("linear_gated_residual", backend)(**call)
    expected = reference.linear_gated_residual(**call)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@by_every_kernel
def test_a_mean_far_from_zero(backend, dtype):
    call = call_of("adaln_linear", 1, 5, 200, 30, dtype=dtype, device=DEVICES[backend])
    call["x"] = (torch.randn(1, 5, 200, device=DEVICES[backend]) + 3000).to(dtype)
    check("adaln_linear", backend, call)


@pytest.mark.parametrize("op", OPS)
@by_every_kernel
def test_not_a_number_and_infinity_stay_in_their_row(op, backend):
    call, run = call_of(op, 1, 21, 70, 53, device=DEVICES[backend]), kernel(op, backend)
    first = next(iter(call))
    clean = run(**call)
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = call[first].clone()
        broken[0, 13, 69] = bad
        result = run(**call | {first: broken})
        assert not result[0, 13].isfinite().any()
        assert result[0, :13].equal(clean[0, :13]) and result[0, 14:].equal(clean[0, 14:])


# C++.


def cpp(op):
    return kernel(op, "cpp")


@needs_native
@pytest.mark.parametrize("op", OPS)
@given(st.data())
def test_outputs(op, data):
    call = data.draw(calls(op))
    # The rule is about a root mean square: of a few numbers it judges chance.
    rows = call["x" if op == "adaln_linear" else "h"]
    assume(not 0 < rows.shape[0] * rows.shape[1] * call["weight"].shape[0] < 64)
    check(op, "cpp", call)


@needs_native
@pytest.mark.parametrize(
    "width, dtype",
    [
        (768, torch.float32),
        (1024, torch.float32),
        (1152, torch.float32),
        (768, torch.bfloat16),
        (768, torch.float16),
    ],
    ids=str,
)
def test_the_models_widths(width, dtype):
    for op, depth, outputs in (
        ("adaln_linear", width, 3 * width),
        ("adaln_linear", width, 4 * width),
        ("linear_gated_residual", width, width),
        ("linear_gated_residual", 4 * width, width),
    ):
        check(op, "cpp", call_of(op, 1, 16, depth, outputs, dtype=dtype))


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_more_rows_than_a_slab(op):
    check(op, "cpp", call_of(op, 3, 291, 131, 49))


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_row_is_the_same_bits_in_every_batch(op, dtype):
    call = call_of(op, 1, 300, 200, 100, dtype=dtype, whole=(True, True))
    every = cpp(op)(**call)
    for begin, end in ((0, 1), (7, 9), (100, 103), (250, 257), (0, 16), (37, 290)):
        part = {
            name: value[:, begin:end]
            if isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[1] == 300
            else value
            for name, value in call.items()
        }
        assert cpp(op)(**part).equal(every[:, begin:end])


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_on_any_number_of_threads(op):
    call = call_of(op, 1, 270, 300, 700)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpp(op)(**call))
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1]) and results[0].equal(results[2])


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lesser_instruction_sets(isa):
    """The accuracy rule again, in a process that is told to use the older one."""
    program = f"""
import torch
from ecar_kernels import _native
from ecar_kernels.registry import KERNEL_DTYPES
from tests.ecar_kernels.test_flow_block import check
from tests.support.flow_block import OPS, call_of
print(_native.instruction_set())
torch.manual_seed({torch.initial_seed() % 2**32})
for dtype in KERNEL_DTYPES:
    for op in OPS:
        for shape in ((2, 40, 1, 1), (2, 19, 200, 53), (1, 64, 384, 96), (3, 50, 129, 200)):
            check(op, "cpp", call_of(op, *shape, dtype=dtype))
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

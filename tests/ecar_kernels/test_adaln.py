"""The adaLN family: the references against the formulas, and the kernels against the references.

What is particular to the launches of Triton's kernels is in triton/test_adaln_triton.py.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecar_kernels import adaln, gated_residual, gated_residual_adaln, use_backend
from ecar_kernels.adaln import reference
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.accuracy import assert_accurate, largest_error, run, tensors, ulp
from tests.support.adaln import LAYOUTS, MODULATION, call_of
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

CONTIGUOUS = ("contiguous",) * 8


def call(
    op,
    backend,
    *shape,
    dtype=torch.float32,
    layouts=CONTIGUOUS,
    whole=(True,) * 3,
    steps=("one",) * 3,
):
    return call_of(op, *shape, dtype, layouts, whole, steps, DEVICES[backend])


def check(op, backend, arguments, *, gradients=True):
    assert_accurate(kernel(op, backend), getattr(reference, op), arguments, gradients=gradients)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("op", MODULATION)
@by_every_kernel
def test_gradients_of_some_arguments_only(op, backend, dtype):
    """Each tensor alone: what is not asked for is not made, what is asked for is the same."""
    shape = (3, 21, 50) if backend == "cpp" else (2, 5, 50)
    for each in (True, False):
        arguments = call(
            op, backend, *shape, dtype=dtype, whole=(each,) * 3, steps=("one", "rows", "one")
        )

        def gradients(names, arguments=arguments):
            inputs = {
                name: value.clone().requires_grad_(name in names)
                for name, value in arguments.items()
            }
            outputs = tensors(kernel(op, backend)(**inputs))
            sum((y.float() * (i + 1)).sin().sum() for i, y in enumerate(outputs)).backward()
            return {name: value.grad for name, value in inputs.items()}

        every = gradients(tuple(arguments))
        assert all(value is not None for value in every.values())
        for name in arguments:
            alone = gradients((name,))
            assert alone[name].equal(every[name])
            assert all(alone[other] is None for other in arguments if other != name)


@pytest.mark.parametrize("op", MODULATION)
@by_every_kernel
def test_the_gradient_of_a_sum(op, backend):
    """It is one number, expanded to all elements: with strides of 0."""
    arguments = call(op, backend, 2, 3, 40, whole=(False, True, False))

    def summed(function):
        inputs = {name: value.clone().requires_grad_() for name, value in arguments.items()}
        sum(y.sum() for y in tensors(function(**inputs))).backward()
        return {name: value.grad for name, value in inputs.items()}

    found, expected = summed(kernel(op, backend)), summed(getattr(reference, op))
    for name, value in found.items():
        # Terms of up to a few units each, at most 240 of them.
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-4)


@by_every_kernel
def test_a_gradient_for_one_output_of_two(backend):
    op = "gated_residual_adaln"
    arguments = call(op, backend, 2, 9, 33, whole=(False,) * 3)
    for output in (0, 1):
        assert_accurate(
            lambda output=output, **call: kernel(op, backend)(**call)[output],
            lambda output=output, **call: _used(reference.gated_residual_adaln(**call), output),
            arguments,
            gradients=True,
        )
    inputs = {name: value.clone().requires_grad_() for name, value in arguments.items()}
    kernel(op, backend)(**inputs)[0].sin().sum().backward()
    names = ("x", "branch", "gate", "step_gate")
    gated = {name: arguments[name].clone().requires_grad_() for name in names}
    kernel("gated_residual", backend)(**gated).sin().sum().backward()
    for name, value in inputs.items():
        assert value.grad.equal(gated[name].grad if name in gated else torch.zeros_like(value))


def _used(outputs, index):
    """One output; of the other, gradients that are zeros and not missing."""
    return outputs[index] + 0 * outputs[1 - index]


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


@needs_native
@pytest.mark.parametrize("op", MODULATION)
@given(st.data())
def test_outputs(op, data):
    with torch.no_grad():
        assert_accurate(cpp(op), getattr(reference, op), data.draw(calls(op, st.integers(1, 150))))


@needs_native
@pytest.mark.parametrize("op", MODULATION)
@given(st.data())
def test_gradients(op, data):
    """From 24 channels: the error of a sum into one or two numbers is a matter of luck."""
    call = data.draw(calls(op, st.integers(24, 150)))
    assert_accurate(cpp(op), getattr(reference, op), call, gradients=True)


@needs_native
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
        dict(zip(small, run(cpp(op), call, None, weights)[len(weights) :], strict=True))
        for call in (small, whole)
    )
    for name, value in small.items():
        term = terms[name.removeprefix("step_")].double()
        dims = [d for d in range(3) if value.shape[d] < term.shape[d]]
        expected, size = (t.sum(dims, keepdim=True) if dims else t for t in (term, term.abs()))
        assert ((found[name] - expected).abs() <= 16 * 2**-24 * size).all(), name


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("op", MODULATION)
@pytest.mark.parametrize("channels", [768, 1024, 1152])
def test_the_models_widths(op, channels, dtype):
    for broadcast in (True, False):
        call = call_of(op, 2, 64, channels, dtype, ["chunk"] * 8, [broadcast] * 3, ["one"] * 3)
        assert_accurate(cpp(op), getattr(reference, op), call, gradients=True)


def gradient_of(op):
    """The gradient of x as a function of the arguments, for the rule to differentiate."""

    def gradient(x, **modulation):
        x = x if x.requires_grad else x.clone().requires_grad_()
        return torch.autograd.grad(op(x, **modulation).sin().sum(), x, create_graph=True)[0]

    return gradient


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 29, 80])
def test_second_derivatives_are_accurate(channels, dtype):
    """Of rows wide enough that their deviation is not now and then near zero, and so many that
    the root mean square of a gradient is not a matter of chance."""
    x, shift, scale = torch.randn(3, 32, 24, channels).to(dtype)
    call = {"x": x, "shift": shift, "scale": scale[:, :1]}
    assert_accurate(gradient_of(cpp("adaln")), gradient_of(reference.adaln), call, gradients=True)


@needs_native
def test_gradients_of_sums_over_many_tokens_stay_accurate():
    """Blocks, then blocks in double: not one long chain of additions."""
    call = call_of(
        "adaln", 4, 3000, 17, torch.float32, ["contiguous"] * 8, [False] * 3, ["one"] * 3
    )
    assert_accurate(cpp("adaln"), reference.adaln, call, gradients=True)


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

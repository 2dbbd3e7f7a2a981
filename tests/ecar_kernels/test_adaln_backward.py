"""The adaLN family's gradients: every backend's against the references', by the accuracy rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecar_kernels.adaln import reference
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.accuracy import assert_accurate, run, tensors
from tests.support.adaln import MODULATION, call_of, calls
from tests.support.backends import DEVICES, by_every_kernel, kernel
from tests.support.native import needs_native


def call(op, backend, *shape, **kinds):
    return call_of(op, *shape, **kinds, device=DEVICES[backend])


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


# C++.


def cpp(op):
    return kernel(op, "cpp")


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

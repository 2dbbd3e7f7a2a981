"""The fused GEMMs' gradients: every backend's against the references', by the accuracy rule; what
is kept for them, and which forward they come with."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ecar_kernels import registry, restore, use_backend
from ecar_kernels.flow_block import autograd, packing, reference
from ecar_kernels.modules import StageBlock
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.accuracy import assert_accurate
from tests.support.backends import DEVICES, by_every_kernel, kernel
from tests.support.flow_block import OPS, call_of, calls
from tests.support.modules import accelerated
from tests.support.native import needs_native

pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning:triton"
)


def split(call, names):
    """Of a call, the tensors of these names, and the rest."""
    return {n: call[n] for n in names}, {n: v for n, v in call.items() if n not in names}


def assert_gradients(op, backend, call, names=None):
    """Those of the arguments named, None for all tensors; the others have none."""
    names = names or [n for n, value in call.items() if isinstance(value, torch.Tensor)]
    of, rest = split(call, names)

    def candidate(**given):
        return kernel(op, backend)(**given, **rest)

    def plain(**given):
        dtype = next(iter(given.values())).dtype
        return getattr(reference, op)(
            **given,
            **{n: v.to(dtype) if isinstance(v, torch.Tensor) else v for n, v in rest.items()},
        )

    assert_accurate(candidate, plain, of, gradients=True)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@by_every_kernel
def test_gradients_of_some_arguments_only(op, backend, dtype):
    """All, all but the weight and the gates, with which another forward comes, and each alone."""
    shape = (2, 21, 50, 40) if backend == "cpp" else (2, 9, 24, 40)
    for whole, gelu in (((True, True), True), ((False, False), False)):
        call = call_of(
            op,
            *shape,
            dtype=dtype,
            whole=whole,
            steps=("one", "rows"),
            gelu=gelu,
            device=DEVICES[backend],
        )
        names = [n for n, value in call.items() if isinstance(value, torch.Tensor)]
        # Triton's kernels may be interpreted.
        frozen = [n for n in names if n != "weight" and "gate" not in n]
        alone = [[name] for name in names] if backend == "cpp" else []
        for some in (names, frozen, *alone):
            assert_gradients(op, backend, call, some)


@pytest.mark.parametrize("offset", [1.0, 0.0, -2.5])
@by_every_kernel
def test_what_is_added_to_scale(backend, offset):
    """In PyTorch's ops where it is not 1."""
    call = call_of(
        "adaln_linear", 2, 9, 24, 40, scale_offset=offset, gelu=False, device=DEVICES[backend]
    )
    assert_gradients("adaln_linear", backend, call)


@pytest.mark.parametrize("op", OPS)
@by_every_kernel
def test_the_gradient_of_a_sum(op, backend):
    """It is one number, expanded to all elements: with strides of 0."""
    call = call_of(op, 2, 9, 24, 40, whole=(False, True), device=DEVICES[backend])
    names = [n for n, value in call.items() if isinstance(value, torch.Tensor)]

    def summed(function):
        of, rest = split(call, names)
        of = {name: value.clone().requires_grad_() for name, value in of.items()}
        function(**of, **rest).sum().backward()
        return {name: value.grad for name, value in of.items()}

    found, expected = summed(kernel(op, backend)), summed(getattr(reference, op))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-3)


@needs_native
@pytest.mark.parametrize("op", OPS)
@given(st.data())
def test_gradients(op, data):
    call = data.draw(calls(op))
    rows = call["x" if op == "adaln_linear" else "h"]
    # The rule is about a root mean square: of a few numbers it judges chance.
    assume(not 0 < rows.shape[0] * rows.shape[1] < 16 and min(call["weight"].shape) >= 24)
    assert_gradients(op, "cpp", call)


@by_every_kernel
def test_what_is_kept(backend):
    """Beyond the arguments the tokens before a GELU, and a branch for its gate's gradient alone."""

    def made(op, call, names):
        """What the backward has that is no argument, as shapes."""
        given = {
            name: value.clone().requires_grad_(name in names)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in call.items()
        }
        mine = {value.data_ptr() for value in given.values() if isinstance(value, torch.Tensor)}
        saved = kernel(op, backend)(**given).grad_fn.saved_tensors
        new = [x for x in saved if x is not None and x.data_ptr() not in mine]
        return [tuple(x.shape) for x in new if x.untyped_storage().nbytes() > x.element_size()]

    op, every = "adaln_linear", ("x", "shift", "scale", "weight", "bias")
    for gelu in (False, True):
        call = call_of(op, 2, 9, 24, 40, gelu=gelu, device=DEVICES[backend])
        assert made(op, call, every) == [(2, 9, 40)] * gelu
    op = "linear_gated_residual"
    call = call_of(op, 2, 9, 24, 40, device=DEVICES[backend])
    assert made(op, call, ("h", "weight", "residual")) == []
    for name in ("gate", "step_gate"):
        assert made(op, call, ("h", name)) == [(2, 9, 40)]
    # Without gradients of weight and gate, h need not be kept.
    given = {n: v.clone().requires_grad_(n == "h") for n, v in call.items()}
    saved = kernel(op, backend)(**given).grad_fn.saved_tensors
    assert given["h"].data_ptr() not in {x.data_ptr() for x in saved if x is not None}


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_a_trained_weight_is_not_packed(op):
    """It is another after each step. A frozen one is, and gives the bits that it gives without
    gradients."""
    call = call_of(op, 2, 9, 24, 40, gelu=False)
    first = next(iter(call))
    run = kernel(op, "cpp")
    packing.forget_packed()
    call["weight"].requires_grad_()
    run(**call)
    assert not packing._packed
    call["weight"].requires_grad_(False)
    with torch.no_grad():
        expected = run(**call)
    assert run(**call | {first: call[first].clone().requires_grad_()}).equal(expected)


@needs_native
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_weight_held_packed(op, trained):
    """It is turned back for the backward, at the latest."""
    call = call_of(op, 2, 9, 24, 40)
    weight = torch.nn.Parameter(call["weight"].clone(), requires_grad=trained)
    assert packing.pack_weight(weight)
    call["weight"] = call["weight"].requires_grad_(trained)
    grads = []
    for its in (weight, call["weight"]):
        first = next(iter(call))
        given = call | {"weight": its, first: call[first].clone().requires_grad_()}
        kernel(op, "cpp")(**given).square().sum().backward()
        grads.append([given[first].grad, its.grad])
    assert type(weight) is torch.nn.Parameter and weight.equal(call["weight"])
    assert grads[0][0].equal(grads[1][0])
    assert grads[0][1].equal(grads[1][1]) if trained else grads[0][1] is None


@by_every_kernel
@pytest.mark.parametrize("op", OPS)
def test_a_bound_op_under_autocast(op, backend):
    """It computes in its arguments' type, and its backward, too, where that is called there."""
    call = call_of(op, 2, 9, 24, 40, device=DEVICES[backend])
    names = [n for n, value in call.items() if isinstance(value, torch.Tensor)]

    def gradients(autocast):
        given = {n: v.clone().requires_grad_() if n in names else v for n, v in call.items()}
        with torch.autocast(DEVICES[backend], torch.bfloat16, enabled=autocast):
            kernel(op, backend)(**given).square().sum().backward()
        return [given[name].grad for name in names]

    for inside, outside in zip(gradients(True), gradients(False), strict=True):
        assert inside.equal(outside)


def test_wider_tokens_than_the_adaln_family_s():
    """Such are PyTorch's where gradients are asked for."""
    for op, make in (
        ("adaln_linear", autograd.adaln_linear),
        ("linear_gated_residual", autograd.linear_gated_residual),
    ):
        call = call_of(op, 1, 3, 40, 40, gelu=False)
        run = make(None, None, None, by_cpp=False, widest=32)
        result = run(**call | {"weight": call["weight"].requires_grad_()})
        assert result.equal(getattr(reference, op)(**call))


@needs_native
@pytest.mark.parametrize("frozen", [False, True])
def test_an_accelerated_block_without_no_grad(frozen):
    """A frozen block has the fused ops although grad mode is on; one that is trained keeps less."""
    block = accelerated(StageBlock(24, 2)).requires_grad_(not frozen)
    x = torch.randn(2, 5, 24, requires_grad=True)
    with registry.record() as log:
        block(x).square().sum().backward()
    assert ("adaln_linear" in log) == frozen
    expected = x.grad.clone()
    x.grad = None
    with use_backend("reference"):
        restore(block)(x).square().sum().backward()
    assert (x.grad - expected).abs().max() <= 1e-5 * expected.abs().max()

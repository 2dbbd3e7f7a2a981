"""torch.func, forward-mode AD and derivatives of derivatives through every op, by every backend.

The reference is composed of PyTorch's ops, whose derivatives finite differences confirm in
test_all_ops.py; what a backend answers is what the reference answers, or an error. A new op of
the registry is in every table here.
"""

import threading

import pytest
import torch
from torch.autograd import forward_ad

import ecar_kernels
from ecar_kernels import registry, use_backend
from ecar_kernels.registry import IMPLEMENTATIONS, OPS
from tests.support import transforms
from tests.support.accuracy import tensors
from tests.support.ops import (
    DIFFERENTIABLE,
    INFERENCE_ONLY,
    arguments,
    function,
    small_arguments,
    tensor_names,
)

BACKENDS = [
    (op, backend)
    for op in OPS
    for backend in ("auto", *registry.BACKENDS[1:])
    if backend == "auto" or backend in IMPLEMENTATIONS[op]
]
WITHOUT_DERIVATIVES = (*INFERENCE_ONLY, "initial_noise")


def of(ops):
    return [pair for pair in BACKENDS if pair[0] in ops]


@pytest.fixture(autouse=True)
def serving(request):
    """The backend of the table's row, in force for the test."""
    row = getattr(request.node, "callspec", None)
    backend = "auto" if row is None else row.params.get("backend", "auto")
    if backend != "auto":
        reason = IMPLEMENTATIONS[row.params["op"]][backend].why_not("cpu", torch.float32)
        if reason is not None:
            pytest.skip(reason)
    with use_backend(backend):
        yield


def of_tensors(op: str, run=None, **changes):
    """The op as a function of its floating tensors alone, and these, small."""
    call = small_arguments(op) | changes
    names = [name for name in tensor_names(op) if name in call]
    run = run or function(op)

    def call_op(*values):
        return run(**call | dict(zip(names, values, strict=True)))

    return call_op, [call[name] for name in names]


def assert_as_the_reference(transform, call, values):
    with use_backend("reference"):
        expected = transform(call, values)
    assert any(wanted.any() for wanted in expected)
    for result, wanted in zip(transform(call, values), expected, strict=True):
        torch.testing.assert_close(
            result, wanted, rtol=1e-4, atol=1e-4 * wanted.detach().abs().max().item()
        )


def test_every_op_is_in_the_tables():
    assert {op for op, _ in BACKENDS} == set(OPS)
    assert set(DIFFERENTIABLE) | set(WITHOUT_DERIVATIVES) == set(OPS)


@pytest.mark.parametrize("transform", transforms.ALL, ids=lambda t: t.__name__)
@pytest.mark.parametrize("op, backend", of(DIFFERENTIABLE))
def test_differentiable_ops(op, backend, transform):
    assert_as_the_reference(transform, *of_tensors(op))


@pytest.mark.parametrize("transform", transforms.DERIVATIVES, ids=lambda t: t.__name__)
@pytest.mark.parametrize("op, backend", of(INFERENCE_ONLY))
def test_inference_only_ops_have_no_derivatives(op, backend, transform):
    with pytest.raises(ValueError, match="this op is for inference only"):
        transform(*of_tensors(op))


@pytest.mark.parametrize(
    "transform", [*transforms.BATCHES, *transforms.DERIVATIVES_OF_BATCHES], ids=lambda t: t.__name__
)
@pytest.mark.parametrize("op, backend", of(INFERENCE_ONLY))
def test_inference_only_ops_in_batches(op, backend, transform):
    assert_as_the_reference(transform, *of_tensors(op))


@pytest.mark.parametrize("op, backend", of(["initial_noise", "upsample_renoise_euler"]))
def test_seeds_in_batches(op, backend):
    call = arguments(op, optional=False)
    seeds = torch.stack([call["seeds"], call["seeds"] + 1], 1)
    found = tensors(
        torch.func.vmap(lambda seeds: function(op)(**call | {"seeds": seeds}), in_dims=1)(seeds)
    )
    for row in range(2):
        alone = tensors(function(op)(**call | {"seeds": seeds[:, row].contiguous()}))
        for result, wanted in zip(found, alone, strict=True):
            torch.testing.assert_close(result[row], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", ["dt", "guidance_scale", "ratio"])
@pytest.mark.parametrize("op, backend", of(["euler_step", "upsample_renoise_euler"]))
def test_numbers_on_the_device(op, backend, number):
    """A 0-dim tensor: in batches and tangents as the reference; grad is refused by name."""
    call, scale = small_arguments(op), torch.tensor(1.5)
    names = tensor_names(op)
    values = [call[name] for name in names]

    def guided(scale, *values):
        given = dict(zip(names, values, strict=True)) | {number: scale}
        return function(op)(**call | given)

    for transform in (transforms.forward_derivative, transforms.rows):
        assert_as_the_reference(transform, guided, [scale, *values])
    with pytest.raises(ValueError, match=f"argument '{number}'"):
        transforms.gradient(guided, [scale, *values])


@pytest.mark.parametrize("op, backend", of(DIFFERENTIABLE))
def test_one_tensor_for_several_arguments(op, backend):
    """Each has its own part in the second derivative."""
    call, values = of_tensors(op)

    def of_one(x):
        return call(*(x if y.shape == x.shape else y for y in values))

    assert_as_the_reference(transforms.gradient_of_gradients, of_one, values[:1])


@pytest.mark.parametrize("op, backend", of([op for op in OPS if op != "initial_noise"]))
def test_bound_ops(op, backend):
    """`resolve` binds ahead of time, and still answers as the reference."""
    for transform in (
        transforms.forward_derivative,
        transforms.dual_numbers_without_grad_mode,
        transforms.gradient,
        transforms.rows,
    ):
        _, values = of_tensors(op)
        with use_backend("reference"):
            bound_reference = registry.resolve(op, device="cpu", dtype=torch.float32)
        bound = registry.resolve(op, device="cpu", dtype=torch.float32)
        results = [transform(of_tensors(op, run)[0], values) for run in (bound, bound_reference)]
        for result, wanted in zip(*results, strict=True):
            assert wanted.any()
            torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


def test_an_open_level_is_no_ones_tangent():
    """Inference-only ops serve tensors without tangents, and say which one has one."""
    call = arguments("flow_boundary")
    expected = ecar_kernels.flow_boundary(**call)
    with forward_ad.dual_level():
        torch.testing.assert_close(ecar_kernels.flow_boundary(**call), expected)
        dual = forward_ad.make_dual(call["weight"], torch.ones_like(call["weight"]))
        with pytest.raises(ValueError, match="argument 'weight': has a tangent"):
            ecar_kernels.flow_boundary(**call | {"weight": dual})


def test_torch_func_in_one_thread_leaves_the_others_their_backend():
    found = []

    def look():
        found.append(registry.implementation("adaln", "cpu", torch.float32).backend)

    def inside(x):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        look()
        return x.sin()

    look()
    torch.func.grad(inside)(torch.tensor(1.0))
    assert found[0] == found[1]
    assert found[2].endswith("reference")


def compiled(call):
    return torch.compile(call, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("op", ["stage_attention", "gated_residual_adaln"])
def test_a_compiled_op_in_forward_mode(op):
    """The graph that was there before, of kernels, is not taken."""
    call, values = of_tensors(op)
    torch._dynamo.reset()
    graph = compiled(call)
    graph(*values)
    try:
        assert_as_the_reference(transforms.dual_numbers, graph, values)
    except torch._dynamo.exc.Unsupported as error:  # of PyTorch 2.14
        assert "dual tensor" in str(error)


@pytest.mark.parametrize(
    "op, transform",
    [
        ("gated_residual_adaln", transforms.forward_derivative),
        ("gated_residual_adaln", transforms.gradient),
        ("gated_residual_adaln", transforms.rows),
        ("adaln_linear", transforms.rows),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_transforms_inside_a_compiled_graph(op, transform):
    call, values = of_tensors(op)
    torch._dynamo.reset()
    compiled(call)(*values)

    def in_graph(function, values):
        return compiled(lambda *given: transform(function, given))(*values)

    assert_as_the_reference(in_graph, call, values)

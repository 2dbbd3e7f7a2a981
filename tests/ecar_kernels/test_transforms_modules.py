"""torch.func, forward-mode AD and second derivatives through the modules, plain and accelerated."""

import inspect

import pytest
import torch
from torch import nn

import ecar_kernels
from ecar_kernels import FlowBlock, OpsModule, use_backend
from ecar_kernels.flow_block.packing import PackedWeight
from tests.ecar_kernels.test_transforms import assert_as_the_reference
from tests.support import transforms
from tests.support.accuracy import tensors
from tests.support.modules import accelerated, arguments_of, functional
from tests.support.native import needs_native

WIDTH, STAGES = 16, (1, 4)
X, ONE, SIX = (2, 5, WIDTH), (2, 1, WIDTH), (6, 2, 5, WIDTH)
# For each class a module, how it is called, and its tensors.
MODULES = {
    "AdaLN": (
        ecar_kernels.AdaLN,
        lambda module, x, shift, scale: module(x, shift, scale),
        {"x": X, "shift": ONE, "scale": X},
    ),
    "GatedResidual": (
        ecar_kernels.GatedResidual,
        lambda module, x, branch, gate: module(x, branch, gate),
        {"x": X, "branch": X, "gate": ONE},
    ),
    "Linear": (lambda: ecar_kernels.Linear(WIDTH, 9), lambda module, x: module(x), {"x": X}),
    "MLP": (lambda: ecar_kernels.MLP(WIDTH, 24), lambda module, x: module(x), {"x": X}),
    "StageAttention": (
        lambda: ecar_kernels.StageAttention(WIDTH, 2),
        lambda module, x: module(x, STAGES),
        {"x": X},
    ),
    "StageBlock": (
        lambda: ecar_kernels.StageBlock(WIDTH, 2, 24),
        lambda module, x: module(x, STAGES),
        {"x": X},
    ),
    "FlowBlock": (
        lambda: FlowBlock(WIDTH, 2, 24),
        lambda module, x, y, spatial, step: module(x, y, spatial.unbind(), step.unbind()),
        {"x": X, "y": X, "spatial": SIX, "step": (6, 2, 1, WIDTH)},
    ),
}
WAYS = {
    "plain": lambda module: module,
    "accelerated": accelerated,
    "packed": lambda module: accelerated(module, keep_weights=False),
    "triton": lambda module: accelerated(module, backend="triton"),
}


def of_tensors(name: str, way: str):
    """The module as a function of its inputs and weights, and these."""
    build, call, shapes = MODULES[name]
    module = build()
    values = arguments_of(module, shapes, torch.float32)
    if way == "packed":  # weights of its own, for a packed one is nothing to substitute
        values = {key: value for key, value in values.items() if key in shapes}
    module = WAYS[way](module)

    def call_module(*given):
        given = dict(zip(values, given, strict=True))
        return call(module, **given) if way == "packed" else functional(module, call)(**given)

    return call_module, list(values.values()), module


def test_every_module_is_in_the_table():
    public = {name: getattr(ecar_kernels, name) for name in ecar_kernels.__all__}
    modules = {
        name
        for name, value in public.items()
        if inspect.isclass(value) and issubclass(value, nn.Module)
    }
    assert set(MODULES) == modules - {OpsModule.__name__}


@pytest.mark.parametrize(
    "transform",
    [
        transforms.forward_derivative,
        transforms.dual_numbers_without_grad_mode,
        transforms.gradient,
        transforms.gradient_of_each_row,
        transforms.forward_derivative_of_a_batch,
        transforms.rows,
        transforms.rows_last,
        *transforms.OF_BACKWARDS,
    ],
    ids=lambda transform: transform.__name__,
)
@pytest.mark.parametrize("way", ["plain", "accelerated"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, way, transform):
    call, values, _ = of_tensors(name, way)
    assert_as_the_reference(transform, call, values)


@pytest.mark.parametrize("way", ["plain", "accelerated"])
@pytest.mark.parametrize("name", MODULES)
def test_no_images(name, way):
    call, values, _ = of_tensors(name, way)
    weights = len(values) - len(MODULES[name][2])  # they come first
    values = transforms.leaves(
        [*values[:weights], *(x[:, :0] if x.ndim == 4 else x[:0] for x in values[weights:])]
    )
    outputs = tensors(call(*values))
    assert all(0 in y.shape for y in outputs)
    sum(y.sum() for y in outputs).backward()
    for x in values:
        assert x.grad.shape == x.shape and not x.grad.any()
    with torch.no_grad():
        again = tensors(call(*values))
    assert [y.shape for y in again] == [y.shape for y in outputs]


@needs_native
@pytest.mark.parametrize(
    "transform",
    [transforms.dual_numbers_without_grad_mode, transforms.rows_last, transforms.gradient],
    ids=lambda transform: transform.__name__,
)
@pytest.mark.parametrize("name", ["Linear", "StageBlock", "FlowBlock"])
def test_weights_held_packed(name, transform):
    """They are turned back inside the transform, and are plain weights after it."""
    call, values, module = of_tensors(name, "packed")
    assert any(type(weight) is PackedWeight for weight in module.parameters())
    found = transform(call, values)
    assert not any(type(weight) is PackedWeight for weight in module.parameters())
    with use_backend("reference"):
        expected = transform(call, values)
    for result, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)
    assert all(weight.isfinite().all() for weight in module.state_dict().values())


@pytest.mark.parametrize(
    "transform",
    [
        transforms.dual_numbers_without_grad_mode,
        transforms.rows_last,
        transforms.gradient_of_gradients,
    ],
    ids=lambda transform: transform.__name__,
)
@pytest.mark.parametrize("name", ["AdaLN", "StageAttention", "FlowBlock"])
def test_modules_by_triton(name, transform):
    pytest.importorskip("triton")
    with use_backend("triton"):
        call, values, _ = of_tensors(name, "triton")
        assert_as_the_reference(transform, call, values)


@pytest.mark.parametrize(
    "transform",
    [
        transforms.forward_derivative,
        transforms.dual_numbers_without_grad_mode,
        transforms.rows,
        *transforms.OF_BACKWARDS,
    ],
    ids=lambda transform: transform.__name__,
)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("way", ["plain", "accelerated", "packed"])
def test_the_inference_path(way, frozen, transform):
    """Of fused ops, which differentiate and batch like the others."""
    block = WAYS[way](FlowBlock(WIDTH, 2, 24).requires_grad_(not frozen))
    values = [torch.randn(X), torch.randn(SIX), torch.randn(6, 1, 1, WIDTH)]

    def infer(x, spatial, step):
        return block.infer(x, spatial.unbind(), step.unbind())

    assert_as_the_reference(transform, infer, values)

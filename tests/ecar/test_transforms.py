"""Derivatives and batches of the whole model, as torch.func and forward-mode AD take them."""

import pytest
import torch
from torch.autograd import forward_ad

from ecar.sampling import graph, sample
from ecar_kernels import use_backend
from tests.ecar.conftest import tiny_model
from tests.ecar.test_model import training_inputs
from tests.ecar_kernels.test_transforms import assert_as_the_reference
from tests.support import transforms
from tests.support.modules import accelerated


def of_tensors(model):
    """The losses as a function of latents, noise, times and weights, and these."""
    latents, labels, noise, tau = training_inputs(model.config, rows=2)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def losses(latents, noise, tau, *values):
        return torch.func.functional_call(
            model, dict(zip(weights, values, strict=True)), (latents, labels, noise, tau)
        )

    return losses, [latents, noise, tau, *weights.values()]


@pytest.mark.parametrize(
    "transform",
    [
        transforms.forward_derivative,
        transforms.dual_numbers_without_grad_mode,
        transforms.gradient,
        transforms.gradient_of_each_row,
        transforms.rows,
        transforms.gradient_of_gradients,
    ],
    ids=lambda transform: transform.__name__,
)
def test_the_training_forward(transform):
    assert_as_the_reference(transform, *of_tensors(tiny_model(ar_layers=1, flow_blocks=1)))


@pytest.mark.parametrize(
    "transform",
    [transforms.dual_numbers_without_grad_mode, transforms.gradient],
    ids=lambda transform: transform.__name__,
)
def test_the_training_forward_of_an_accelerated_model(transform):
    model = accelerated(tiny_model(ar_layers=1, flow_blocks=1))
    assert_as_the_reference(transform, *of_tensors(model))


def test_second_derivatives_through_checkpoints():
    model = tiny_model(ar_layers=1, flow_blocks=1).train()
    model.set_gradient_checkpointing(True)
    assert_as_the_reference(transforms.gradient_of_gradients, *of_tensors(model))


def test_no_graph_is_recorded_in_forward_mode(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert graph.device_reason(torch.device("cuda")) is None
    with forward_ad.dual_level():
        assert "forward-mode AD" in graph.device_reason(torch.device("cuda"))


@pytest.mark.parametrize(
    "prepare", [lambda model: model, accelerated], ids=["plain", "accelerated"]
)
def test_sampling_in_forward_mode(prepare):
    """The bound plan stands back, and a weight's tangent is refused, not lost."""
    model = prepare(tiny_model())

    def draw():
        return sample(model, torch.tensor([3, 4]), seeds=torch.tensor([1, 2]), steps=4).latents

    with use_backend("reference"):
        expected = draw()
    weight = model.heads[0].output.weight
    with forward_ad.dual_level():
        assert (draw() - expected).abs().max() < 1e-4
        dual = forward_ad.make_dual(weight.detach(), torch.ones_like(weight))
        del model.heads[0].output.weight
        model.heads[0].output.weight = dual
        with pytest.raises(ValueError, match="this op is for inference only"):
            draw()

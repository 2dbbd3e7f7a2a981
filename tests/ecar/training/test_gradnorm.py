"""GradNorm against autograd, and what its weights must keep."""

import pytest
import torch

from ecar.config import ECARConfig
from ecar.model import ECAR
from ecar.training import GradNorm
from ecar_kernels import use_backend


@pytest.fixture
def model_and_inputs(generator):
    config = ECARConfig(
        stage_sides=(4, 8, 16),
        channels=2,
        num_classes=5,
        width=16,
        heads=2,
        ar_layers=2,
        flow_blocks=1,
    )
    model = ECAR(config).double()
    for parameter in model.parameters():  # away from adaLN-zero, where no gradient arrives
        parameter.data += 0.1 * torch.randn(
            parameter.shape, generator=generator, dtype=torch.float64
        )
    shape = (3, *config.latent_shape)
    latents, noise = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    labels = torch.randint(0, 6, (3,), generator=generator)
    tau = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    return model, (latents, labels, noise, tau)


def test_one_backward_gives_the_gradients_of_all_stages(model_and_inputs, generator):
    model, inputs = model_and_inputs
    weight = model.ar.last_mlp_output.weight
    with use_backend("reference"):  # which alone takes float64
        expected = [
            torch.autograd.grad(model(*inputs)[stage], weight)[0].float() for stage in range(3)
        ]
    factors = torch.rand(3, generator=generator) + 0.5
    scale = 1024.0
    with use_backend("reference"):
        losses, shared = model(*inputs, return_shared=True)
        ((losses * factors).sum() * scale).backward()
    gradients = shared.stage_gradients()
    assert gradients.dtype == torch.float32
    for stage in range(3):
        torch.testing.assert_close(
            gradients[stage] / (factors[stage] * scale), expected[stage], rtol=1e-5, atol=1e-7
        )
    torch.testing.assert_close(weight.grad.float(), gradients.sum(0), rtol=1e-5, atol=1e-4)


def test_update_is_the_published_one(generator):
    """Against L_grad = sum |w_s n_s - target_s| differentiated by autograd, with torch's Adam."""
    stages, alpha, rate = 4, 1.5, 0.02
    mine = GradNorm(stages, alpha=alpha, learning_rate=rate)
    weights = torch.ones(stages, requires_grad=True)
    adam = torch.optim.Adam([weights], lr=rate)
    first = None
    for _ in range(30):
        losses = torch.rand(stages, generator=generator) + 0.1
        norms = torch.rand(stages, generator=generator) * torch.tensor([0.1, 1.0, 2.0, 5.0])
        first = losses if first is None else first
        weighted = weights * norms
        ratio = losses / first
        target = (weighted.mean() * (ratio / ratio.mean()) ** alpha).detach()
        adam.zero_grad()
        (weighted - target).abs().sum().backward()
        expected = weights.grad.clone()
        adam.step()
        with torch.no_grad():
            weights.clamp_(min=1e-3)
            weights *= stages / weights.sum()
        if mine.steps > 0:
            torch.testing.assert_close(mine.gradient(losses, norms), expected)
        mine.update(losses, norms)
        torch.testing.assert_close(mine.weights, weights.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(mine.initial_losses, first)


def test_weights_stay_positive_and_sum_to_the_stages(generator):
    gradnorm = GradNorm(3, alpha=1.5, learning_rate=0.9)  # steps as large as the weights
    for _ in range(200):
        gradnorm.update(
            torch.rand(3, generator=generator) + 0.01,
            torch.rand(3, generator=generator) * torch.tensor([1e-3, 1.0, 1e3]),
        )
        assert (gradnorm.weights > 0).all()
        assert gradnorm.weights.sum().item() == pytest.approx(3, abs=1e-5)


def test_equal_rates_come_to_equal_norms():
    gradnorm = GradNorm(3, alpha=1.5, learning_rate=1e-3)
    norms = torch.tensor([0.5, 1.0, 1.5])
    for _ in range(3000):
        gradnorm.update(torch.ones(3), norms)
    weighted = gradnorm.weights * norms
    torch.testing.assert_close(weighted, weighted.mean().expand(3), rtol=0.02, atol=0)


def test_a_slower_stage_gains_weight():
    gradnorm = GradNorm(2, alpha=1.5, learning_rate=1e-2)
    gradnorm.update(torch.ones(2), torch.ones(2))
    for _ in range(20):
        gradnorm.update(torch.tensor([0.5, 1.0]), torch.ones(2))
    assert gradnorm.weights[1] > 1 > gradnorm.weights[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_overflow_moves_nothing(bad):
    gradnorm = GradNorm(2, alpha=1.5, learning_rate=1e-2)
    gradnorm.update(torch.ones(2), torch.tensor([1.0, 2.0]))
    before = {name: value.clone() for name, value in gradnorm.state_dict().items()}
    gradnorm.update(torch.ones(2), torch.tensor([1.0, bad]))
    assert all(torch.equal(before[name], value) for name, value in gradnorm.state_dict().items())


def test_state_round_trip(generator):
    one, two = (GradNorm(3, alpha=1.0, learning_rate=0.05) for _ in range(2))
    draws = torch.rand(12, 2, 3, generator=generator) + 0.1
    for losses, norms in draws[:6]:
        one.update(losses, norms)
    two.load_state_dict(one.state_dict())
    for losses, norms in draws[6:]:
        one.update(losses, norms)
        two.update(losses, norms)
    assert torch.equal(one.weights, two.weights)

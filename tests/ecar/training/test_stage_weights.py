"""Uncertainty's weights against autograd, and where they come to rest."""

import pytest
import torch

from ecar.training.stage_weights import Uncertainty


def test_update_is_adam_on_the_likelihood(generator):
    stages, rate = 3, 0.02
    mine = Uncertainty(stages, learning_rate=rate)
    assert torch.equal(mine.weights, torch.ones(stages))
    eta = torch.zeros(stages, requires_grad=True)
    adam = torch.optim.Adam([eta], lr=rate)
    for _ in range(30):
        losses = torch.rand(stages, generator=generator) + 0.05
        adam.zero_grad()
        (losses * torch.exp(-eta) + eta).sum().div(2).backward()
        adam.step()
        mine.update(losses)
        torch.testing.assert_close(mine.log_variances, eta.detach(), rtol=1e-5, atol=1e-6)
    inverse = torch.exp(-eta.detach())
    torch.testing.assert_close(mine.weights, stages * inverse / inverse.sum())


def test_all_stages_come_to_add_the_same():
    losses = torch.tensor([0.8, 0.2, 0.05])
    uncertainty = Uncertainty(3, learning_rate=0.02)
    for _ in range(1000):
        uncertainty.update(losses)
    weighted = uncertainty.weights * losses
    torch.testing.assert_close(weighted, weighted.mean().expand(3), rtol=1e-3, atol=0)
    assert uncertainty.weights.sum().item() == pytest.approx(3, abs=1e-5)


def test_state_round_trip(generator):
    one, two = (Uncertainty(3, learning_rate=0.05) for _ in range(2))
    draws = torch.rand(12, 3, generator=generator) + 0.1
    for losses in draws[:6]:
        one.update(losses)
    two.load_state_dict(one.state_dict())
    for losses in draws[6:]:
        one.update(losses)
        two.update(losses)
    assert torch.equal(one.weights, two.weights)

"""The moving average and its warm-up."""

import pytest
import torch
from torch import nn

from ecar.training import EMA


def test_warm_up_and_decay(generator):
    decay = 0.6  # reached after a few steps, so that both branches are seen
    model = nn.Linear(3, 2)
    ema = EMA(model, decay)
    expected = [parameter.detach().double().clone() for parameter in model.parameters()]
    used = set()
    for t in range(1, 20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        ema.update_parameters(model)
        keep = min(decay, (1 + t) / (10 + t))
        used.add(keep)
        expected = [
            keep * mean + (1 - keep) * parameter.detach().double()
            for mean, parameter in zip(expected, model.parameters(), strict=True)
        ]
        for mean, parameter in zip(expected, ema.module.parameters(), strict=True):
            torch.testing.assert_close(parameter.double(), mean, rtol=1e-5, atol=1e-6)
    assert decay in used and len(used) > 2


def test_begins_as_the_model_and_takes_no_gradient():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9999)
    assert torch.equal(ema.module.weight, model.weight)
    assert not ema.module.weight.requires_grad
    assert not ema.module.training
    assert ema.decay_at(0) == pytest.approx(0.1)
    assert ema.decay_at(10**7) == 0.9999


def test_refuses_a_decay_outside_its_range():
    with pytest.raises(ValueError, match="argument 'decay': expected a number in"):
        EMA(nn.Linear(1, 1), 1.5)

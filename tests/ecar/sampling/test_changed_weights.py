"""Sampling sees the weights' values of now, however they were changed since the last image."""

import copy

import pytest
import torch
from torch import nn

import ecar_kernels
from ecar import ECAR, ECARConfig
from ecar.sampling import sample
from tests.support.modules import accelerated

CONFIG = ECARConfig(
    stage_sides=(4, 8), channels=1, num_classes=10, width=64, heads=4, ar_layers=2, flow_blocks=1
)


def model(seed: int) -> ECAR:
    torch.manual_seed(seed)
    made = ECAR(CONFIG)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.05)
    return made.eval()


def draw(drawn: ECAR) -> torch.Tensor:
    return sample(
        drawn, torch.tensor([1, 2]), seeds=torch.tensor([3, 4]), steps=6, guidance_scale=1.5
    ).latents


def pairs(old: ECAR, new: ECAR):
    return zip(old.parameters(), new.parameters(), strict=True)


def each(change):
    """`change` of each parameter and its new value."""

    def run(old: ECAR, new: ECAR) -> None:
        for parameter, value in pairs(old, new):
            change(parameter, value.detach())

    return run


def foreach(old: ECAR, new: ECAR) -> None:
    values = [value.detach() for value in new.parameters()]
    torch._foreach_copy_([parameter.data for parameter in old.parameters()], values)


def optimizer(old: ECAR, new: ECAR) -> None:
    for parameter, value in pairs(old, new):
        parameter.grad = parameter.detach() - value.detach()
    torch.optim.SGD(old.parameters(), lr=1.0).step()


def averaged(old: ECAR, new: ECAR) -> None:
    """An EMA model's weights stored, copied in as diffusers' EMAModel does, and left there."""
    stored = [parameter.detach().cpu().clone() for parameter in old.parameters()]
    assert stored
    for parameter, value in pairs(old, new):
        parameter.data.copy_(value.to(parameter.device).data)


def merged(old: ECAR, new: ECAR) -> None:
    """A low-rank update added to every matrix, as peft merges an adapter."""
    for (_, module), (_, other) in zip(old.named_modules(), new.named_modules(), strict=True):
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data + (other.weight - module.weight).detach()
            module.bias.data += (other.bias - module.bias).detach()
    own = dict(new.named_parameters())
    for name, parameter in old.named_parameters():
        if not parameter.detach().allclose(own[name].detach(), atol=1e-6):
            parameter.data.copy_(own[name])


CHANGES = {
    "copy_": lambda old, new: torch.no_grad()(each(lambda p, v: p.copy_(v)))(old, new),
    "data.copy_": each(lambda p, v: p.data.copy_(v)),
    "data by row": each(lambda p, v: [a.copy_(b) for a, b in zip(p.data, v, strict=True)]),
    "data =": each(lambda p, v: setattr(p, "data", v.clone())),
    "set_": lambda old, new: torch.no_grad()(each(lambda p, v: p.set_(v.clone())))(old, new),
    "load_state_dict": lambda old, new: old.load_state_dict(new.state_dict()),
    "load_state_dict(assign)": lambda old, new: old.load_state_dict(
        copy.deepcopy(new.state_dict()), assign=True
    ),
    "foreach": foreach,
    "an optimizer": optimizer,
    "an EMA swap": averaged,
    "a merged adapter": merged,
}
WAYS = {
    "plain": lambda made: made,
    "accelerated": accelerated,
    "accelerated, packed alone": lambda made: accelerated(made, keep_weights=False),
    "cpp": lambda made: (
        accelerated(made, backend="cpp")
        if any(row.backend == "cpp" and row.available for row in ecar_kernels.backends())
        else accelerated(made)
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_image_is_of_the_new_weights(change, way):
    drawn, new = WAYS[way](model(0)), model(1)
    before, right = draw(drawn), draw(new)
    assert (before - right).abs().max() > 1e-2
    CHANGES[change](drawn, new)
    assert (draw(drawn) - right).abs().max() < 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_one_number_of_one_weight(way):
    """Not a sample of the weights is looked at, but all."""
    drawn = WAYS[way](model(0))
    draw(drawn)
    for name, parameter in list(drawn.named_parameters()):
        changed = model(0)
        parameter.data.view(-1)[-1] += 3.0
        dict(changed.named_parameters())[name].data.view(-1)[-1] += 3.0
        assert (draw(drawn) - draw(changed)).abs().max() < 1e-4, name
        parameter.data.view(-1)[-1] -= 3.0

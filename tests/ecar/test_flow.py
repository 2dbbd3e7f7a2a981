import pytest
import torch

from ecar.flow import FlowHead, sincos_positions, time_frequencies
from ecar.model import ECAR
from ecar_kernels import use_backend

from .conftest import tiny_config


def head_inputs(model, stage, rows=3):
    config = model.config
    x = torch.randn(rows, *config.stage_shape(stage))
    token_map = torch.randn(rows, config.stage_tokens[stage - 1], config.width)
    return x, token_map


@pytest.mark.parametrize("stage", [1, 2])
def test_hoisted_modulation_equals_the_plain_one(model, stage):
    """The inference path, with its precomputed parts, against the training path."""
    head = model.heads[stage - 1]
    x, token_map = head_inputs(model, stage)
    times = torch.tensor([0.0, 0.3, 0.7])
    with torch.no_grad():
        spatial, steps = head.spatial_parts(token_map), head.step_parts(times)
        for index, time in enumerate(times):
            plain = head(x, time.expand(len(x)), token_map)
            hoisted = head.velocity(x, spatial, steps[index])
            assert (plain - hoisted).abs().max() < 1e-5 * plain.abs().max()


def test_modulation_is_separable(model):
    """One Linear of SiLU(c) + SiLU(t) is the sum of the two parts."""
    head = model.heads[0]
    _, token_map = head_inputs(model, 1)
    time = torch.tensor([0.25])
    with torch.no_grad():
        condition = torch.nn.functional.silu(head.condition(token_map))
        embedded = torch.nn.functional.silu(head.time(time_frequencies(time)))
        together = head.modulation(condition + embedded.unsqueeze(1))
        parts = head.spatial_modulation(token_map) + head.step_modulation(time)
    assert (together - parts).abs().max() < 1e-5


def test_a_new_head_is_zero_and_its_blocks_the_identity():
    model = ECAR(tiny_config())
    head = model.heads[1]
    x, token_map = head_inputs(model, 2)
    assert torch.count_nonzero(head(x, torch.rand(3), token_map)) == 0
    tokens = head.embed_tokens(x)
    parts = head.spatial_parts(token_map)
    steps = head.step_modulation(torch.rand(3)).chunk(head.parts, -1)
    after, _ = head.blocks[0](tokens, tokens, parts[2:8], steps[2:8])
    assert torch.equal(after, tokens)


def test_each_token_follows_its_own_condition(model):
    """The condition differs at each place: changing one token's map changes its patch most."""
    head = model.heads[1]
    x, token_map = head_inputs(model, 2, rows=1)
    changed = token_map.clone()
    changed[0, 5] += 1
    with torch.no_grad():
        difference = head(x, torch.tensor([0.6]), changed) - head(x, torch.tensor([0.6]), token_map)
    patches = difference.unfold(2, 2, 2).unfold(3, 2, 2).square().sum((1, 4, 5)).flatten()
    assert patches.argmax() == 5


def test_positions_and_times_are_those_of_dit():
    positions = sincos_positions(8, 3)
    # Token (row 1, column 2): [sin, cos] of the column's angles, then of the row's.
    column, row = torch.tensor([2.0, 0.02]), torch.tensor([1.0, 0.01])
    expected = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()])
    assert torch.allclose(positions[5], expected, atol=1e-7)
    frequencies = time_frequencies(torch.tensor([0.5]))
    assert frequencies.shape == (1, 256)
    assert torch.allclose(frequencies[0, 0], torch.tensor(500.0).cos())
    assert torch.allclose(frequencies[0, 128], torch.tensor(500.0).sin())


def test_checkpointed_gradients_are_the_same():
    model = ECAR(tiny_config())
    head: FlowHead = model.heads[1]
    torch.nn.init.normal_(head.modulation.weight, std=0.1)
    torch.nn.init.normal_(head.output.weight, std=0.3)
    x, token_map = head_inputs(model, 2)
    gradients = []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        model.train().zero_grad()
        head(x, torch.full((3,), 0.6), token_map).square().mean().backward()
        gradients.append([p.grad.clone() for p in head.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_the_reference_backend_gives_the_same_velocity(model):
    head = model.heads[1]
    x, token_map = head_inputs(model, 2)
    with torch.no_grad():
        default = head(x, torch.full((3,), 0.6), token_map)
        with use_backend("reference"):
            reference = head(x, torch.full((3,), 0.6), token_map)
    assert (default - reference).abs().max() < 1e-5

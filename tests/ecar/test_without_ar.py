"""A model without AR layers (ar_layers=0): all that depends on their number, at none."""

import json

import pytest
import torch

import ecar_kernels
from ecar import ECAR, ECARPipeline
from ecar.checkpoint import BUILT_IN_DEFAULTS
from ecar.cli.info import describe, make_report
from ecar.info import count_multiply_adds, count_parameters
from ecar.sampling import graph
from ecar.sampling.cpu import CpuEngine
from ecar.sampling.solver import AB2
from ecar.transformer import KVCache
from ecar_kernels import FlowBlock, use_backend
from tests.support.native import needs_native

from .conftest import tiny_config, tiny_model
from .sampling.support import TapeRecorder, assert_same_image, draw
from .test_model import training_inputs

SIDES = {"stage_sides": (4, 8, 16)}


@pytest.fixture
def model():
    return tiny_model(ar_layers=0, **SIDES)


def maps(model, labels, ends):
    with torch.no_grad():
        return model.ar(torch.tensor(labels), ends)[0]


@pytest.fixture
def ends(model):
    return [torch.randn(2, *model.config.stage_shape(stage)) for stage in (1, 2)]


def test_every_stage_is_told_the_class(model, ends):
    for one, other in zip(maps(model, [3, 4], ends), maps(model, [3, 5], ends), strict=True):
        assert torch.equal(one[0], other[0])
        assert (one[1] != other[1]).any(dim=-1).all()  # at every token


def test_a_token_is_told_its_part_of_the_end_before_and_nothing_else(model, ends):
    first, second, third = maps(model, [3, 4], ends)
    ends[0][:, :, 2, 1] += 1  # with patch 2, a pixel of a stage is a token of the next
    changed = maps(model, [3, 4], ends)
    assert torch.equal(changed[0], first) and torch.equal(changed[2], third)
    assert (changed[1] != second).any(dim=-1)[0].nonzero().tolist() == [[2 * 4 + 1]]


def test_training_reaches_every_weight(model):
    """As data-parallel training needs it."""
    model.train()(*training_inputs(model.config)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_gradient_checkpointing_and_compiled_regions(model, monkeypatch):
    model.train()
    inputs = training_inputs(model.config)
    expected = model(*inputs)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    model.compile_regions()
    assert compiled == list(model.heads)
    model.set_gradient_checkpointing(True)
    assert torch.equal(model(*inputs), expected)


def test_one_graph_holds_the_whole_model(model):
    inputs = training_inputs(model.config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


def test_gradnorm_has_no_layer_to_look_at(model):
    with pytest.raises(ValueError, match="argument 'return_shared': expected False without AR"):
        model(*training_inputs(model.config), return_shared=True)


def test_the_cache_is_empty(model):
    cache = KVCache(model.config, 2, device=model.device, dtype=model.dtype)
    assert cache.keys.nbytes == cache.values.nbytes == 0


OPTIONS = {"steps": [2, 3, 2], "guidance_scale": 2.5, "guidance_interval": (0.2, 0.9)}


@pytest.fixture
def expected(model):
    """The image by the references, op after op."""
    with use_backend("reference"):
        return draw(model, solver="ab2", **OPTIONS).latents


@needs_native
@pytest.mark.parametrize("accelerated", [False, True])
def test_bound_steps_draw_the_references_image(model, expected, accelerated):
    if accelerated:
        report = ecar_kernels.accelerate(model, keep_weights=False)
        assert "StageBlock" not in str(report) and FlowBlock.__name__ in str(report)
    with torch.no_grad():
        assert CpuEngine.serves(model, AB2)
    assert_same_image(draw(model, solver="ab2", **OPTIONS).latents, expected)


def test_a_graph_draws_the_references_image(model, expected, monkeypatch):
    monkeypatch.setattr(graph, "device_reason", lambda device: None)
    monkeypatch.setattr(graph, "CudaRecorder", TapeRecorder)
    monkeypatch.setattr(CpuEngine, "serves", lambda *settings: False)
    draw(model, (0, 0, 0), solver="ab2", **OPTIONS)
    output = draw(model, solver="ab2", **OPTIONS)  # other classes are other data of one graph
    assert output.why_not_graph is None
    assert_same_image(output.latents, expected)


def test_guidance_has_two_classes_to_tell_apart(model):
    guided, plain = (draw(model, steps=6, guidance_scale=scale).latents for scale in (3.0, 1.0))
    assert (guided - plain).abs().max() > 0.01


def test_a_checkpoint_goes_there_and_back(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["ar_layers"] == 0
    loaded = ECAR.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(draw(loaded).latents, draw(model).latents)
    pipeline = ECARPipeline.from_pretrained(tmp_path)
    assert pipeline([1, 2], seeds=[3, 4], progress=False).images[1].size == (16, 16)


def test_info_counts_no_layers():
    config = tiny_config(ar_layers=0, **SIDES)
    parts = count_parameters(config)
    assert parts["ar_layers"] == 2 * config.width  # the norm
    assert parts["total"] == sum(parameter.numel() for parameter in ECAR(config).parameters())
    # What is left of the AR is the embedding of the ends.
    values = config.channels * (config.patch_size // 2) ** 2
    stages = count_multiply_adds(config, steps=6)
    assert [stage.ar for stage in stages] == [
        0,
        *(n * values * config.width for n in config.stage_tokens[1:]),
    ]
    report = make_report("tiny", config, BUILT_IN_DEFAULTS, {})
    assert "0 AR layers" in describe(report)

"""Every variant of the ablation draws the same image, and each does what it says."""

import pytest
import torch

from benchmarks import models
from benchmarks.paper import ablation
from ecar import ECARConfig, sample
from ecar_kernels import use_backend

CONFIG = ECARConfig(
    stage_sides=(4, 8, 16), channels=2, num_classes=3, width=32, heads=2, ar_layers=2, flow_blocks=2
)


@pytest.fixture
def ways():
    return ablation.variants(models.random_model(CONFIG))


def test_all_variants_draw_the_same_image(ways):
    images = {}
    for name, way in ways.items():
        with use_backend(way.backend):
            images[name] = sample(
                way.model, torch.tensor([1]), seeds=torch.tensor([5]), steps=7
            ).latents
    whole = images.pop(ablation.ALL)
    assert images
    for name, image in images.items():
        torch.testing.assert_close(image, whole, rtol=1e-4, atol=1e-4, msg=name)


def test_switches_do_what_they_say(ways):
    """By the rows that the modulation's projection sees, and those of the AR's layers."""
    rows = {}
    for name, way in ways.items():
        seen = rows[name] = {"modulation": 0, "ar": 0}
        for kind, module in (
            ("modulation", way.model.heads[-1].modulation),
            ("ar", way.model.ar.blocks[0]),
        ):
            module.register_forward_hook(
                lambda module, args, result, seen=seen, kind=kind: (
                    seen.__setitem__(kind, seen[kind] + args[0].shape[1])
                    if args[0].ndim == 3
                    else None
                )
            )  # of tokens, not of the steps' times
        sample(way.model, torch.tensor([1]), seeds=torch.tensor([5]), steps=[1, 1, 6])
    tokens = CONFIG.stage_tokens
    assert rows[ablation.ALL] == {"modulation": tokens[-1], "ar": sum(tokens)}
    assert rows["hoisted modulation"]["modulation"] == 6 * tokens[-1]
    assert rows["KV cache"]["ar"] == tokens[0] * 3 + tokens[1] * 2 + tokens[2]


def test_the_table_has_a_row_for_each(monkeypatch):
    monkeypatch.setattr(ablation.ECARConfig, "preset", lambda size: CONFIG)
    text = ablation.render(ablation.measure("S", 0))
    for name in (*ablation.SWITCHES, ablation.AHEAD, "nothing"):
        assert f" {name} |" in text
    assert "1.00x" in text

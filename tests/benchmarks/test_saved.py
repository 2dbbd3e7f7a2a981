"""What is counted as kept for the backward."""

import torch

from benchmarks import memory, saved
from ecar import ECAR, ECARConfig

CONFIG = ECARConfig(
    stage_sides=(4, 8), channels=1, num_classes=3, width=32, heads=2, ar_layers=2, flow_blocks=1
)


def test_ours_keeps_less_and_weights_are_left_out():
    model = ECAR(CONFIG).train()
    eager, ours = (saved.saved(model, backend) for backend in ("reference", "auto"))
    assert 0 < sum(ours.values()) < sum(eager.values())
    assert ours["flow heads: FlowBlock"] < eager["flow heads: FlowBlock"]
    text = saved.render({"size": "S", "eager": eager, "ours": ours})
    assert "| all " in text and "AR transformer: " in text


def test_the_input_of_a_linear_layer_is_kept_once():
    model = ECAR(CONFIG).train()
    with torch.no_grad():
        assert saved.saved(model, "reference") == {}


def test_a_step_of_s_keeps_three_quarters_of_the_eager_one():
    """When the backward begins: weights, AdamW's two averages, and what is kept of 16 images."""
    model = ECAR(ECARConfig.preset("S")).train()
    standing = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    eager, ours = (
        standing + 16 * sum(saved.saved(model, backend).values())
        for backend in ("reference", "auto")
    )
    assert ours <= memory.TRAINING * eager

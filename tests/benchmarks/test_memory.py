"""What memory is needed, kept for a backward, and seen at its peak."""

import pytest
import torch

from benchmarks import memory
from ecar import ECAR, ECARConfig

TINY = ECARConfig(
    stage_sides=(4, 8), channels=1, num_classes=3, width=16, heads=2, ar_layers=1, flow_blocks=1
)


def test_memory_needed_is_of_the_largest_stage():
    found = memory.needed(TINY, [4, 4])
    assert found == {
        "modulation": 4 * (16 + 4) * 8 * 16,
        "kv_cache": 4 * 2 * 20 * 16,
        "activations": 4 * 16 * 10 * 16,
    }


@pytest.mark.skipif(not memory.STATUS.exists(), reason="needs Linux's /proc")
def test_the_peak_sees_what_is_held_for_a_moment():
    memory.reset_peak()
    before = memory.resident()
    torch.ones(16 * memory.MIB)  # 64 MiB
    assert memory.resident("VmHWM") - before > 60 * memory.MIB


def test_nothing_is_kept_without_gradients():
    model = ECAR(TINY).train()
    with torch.no_grad():
        assert memory.kept(model, "reference") == 0
    assert 0 < memory.kept(model, "auto") < memory.kept(model, "reference")


def test_a_step_of_s_keeps_three_quarters_of_the_eager_one():
    """When the backward begins: weights, AdamW's two averages, and what is kept of 16 images."""
    model = ECAR(ECARConfig.preset("S")).train()
    standing = 3 * memory.weight_bytes(model)
    eager, ours = (standing + 16 * memory.kept(model, name) for name in ("reference", "auto"))
    assert ours <= memory.TRAINING * eager

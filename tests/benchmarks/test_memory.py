"""What memory is needed, kept for a backward, and seen at its peak."""

import pytest
import torch

from benchmarks import memory
from ecar import ECAR, ECARConfig
from ecar_kernels import use_backend

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


def kept(model, backend):
    """Bytes that the loss of one image keeps for its backward, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}  # held, so that no address is used twice

    def pack(tensor):
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            found.setdefault(address, tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with use_backend(backend), hooks:
        model.loss(torch.randn(1, *model.config.latent_shape), torch.zeros(1, dtype=torch.int64))
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def test_nothing_is_kept_without_gradients():
    model = ECAR(TINY).train()
    with torch.no_grad():
        assert kept(model, "reference") == 0
    assert 0 < kept(model, "auto") < kept(model, "reference")


def test_a_step_of_s_keeps_three_quarters_of_the_eager_one():
    """When the backward begins: weights, AdamW's two averages, and what is kept of 16 images."""
    model = ECAR(ECARConfig.preset("S")).train()
    standing = 3 * memory.weight_bytes(model)
    eager, ours = (standing + 16 * kept(model, name) for name in ("reference", "auto"))
    assert ours <= memory.TRAINING * eager


@pytest.mark.skipif(not memory.STATUS.exists(), reason="needs Linux's /proc")
def test_a_process_of_its_own_measures_and_the_table_has_it():
    """With the smallest presets."""
    sampled = memory.alone(memory.sampling, "digits")
    trained = memory.alone(memory.training, "digits", 2, "auto")
    weights = memory.weight_bytes(ECAR(ECARConfig.preset("digits")))
    assert sampled["weights"] == weights and trained["standing"] == 4 * weights
    assert sampled["peak"] > weights
    row = {"size": "digits", "eager": trained, "ours": trained}
    record = {"sampling": [sampled], "training": [row]}
    text = " ".join(memory.render(record).split())
    assert f"| digits | {weights / memory.MIB:.1f} |" in text and "| digits | 2 |" in text

"""Whole models: end to end, against DiT, and memory; with tiny ones."""

import dataclasses
import functools

import pytest
import torch

from benchmarks import dit, end_to_end, mar, memory, models, table2, table3
from benchmarks.models import StageTime
from benchmarks.roofline import Roofline
from ecar.config import ECARConfig
from ecar.sampling import sample
from ecar_kernels import use_backend
from ecar_kernels.costs import Rates
from tests.support.native import needs_native

TINY = ECARConfig(
    stage_sides=(4, 8), channels=1, num_classes=3, width=16, heads=2, ar_layers=1, flow_blocks=1
)
MASKED = mar.MARSize(layers=1, width=16, heads=2, mlp_blocks=1, mlp_width=24, tokens=16, buffer=4)
PEER = dit.DiTSize(layers=1, width=16, heads=2, latent_side=8)


def test_an_image_is_its_stages_and_their_steps():
    stages = [StageTime(1.0, 0.1), StageTime(2.0, 0.2)]
    assert models.image_seconds(stages, 5) == pytest.approx(1 + 3 * 0.1 + 2 + 2 * 0.2)


def test_a_twin_has_the_same_parameters_and_modules_of_its_own():
    model = models.random_model(TINY)
    twin = models.twin(model)
    assert twin is not model and twin.heads[0] is not model.heads[0]
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    assert all(
        weight.abs().sum() > 0
        for head in model.heads
        for weight in (head.modulation.weight, head.output.weight)
    )


@needs_native
def test_end_to_end_has_every_way_and_the_gemms():
    row = end_to_end.measure(
        "S", TINY, 0, steps=8, timed_steps=3, compile=None, rates_found=Rates(1e9, 1e9)
    )
    work = Roofline(TINY, steps=8, itemsize=4).total()
    assert row["floor"]["seconds"] == max(work.bytes, work.multiply_adds) / 1e9
    assert row["seconds"].keys() == {"eager", "ours", "linears", "attention"}
    assert all(summary["min"] > 0 for summary in row["seconds"].values())
    share = row["floor"]["seconds"] / row["seconds"]["ours"]["median"]
    text = end_to_end.render({"rows": [row]})
    assert f"| {share:.0%} |" in " ".join(text.split())
    del row["floor"]  # as in results from before
    assert "floor" not in end_to_end.render({"rows": [row]})
    assert "3 steps of each stage were run and scaled to 8" in text and "wanted >= 1.4x" in text
    assert "torch.compile" not in text
    row |= {"compile": "blocks", "compile_seconds": 12.3}
    assert "E-CAR-S: torch.compile of the repeated block" in end_to_end.render({"rows": [row]})


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_image_is_the_eager_one_and_a_block_is_compiled_once_a_stage(whole):
    torch._dynamo.reset()
    config = dataclasses.replace(TINY, flow_blocks=3)
    model = models.random_model(config)
    graphs = []

    def backend(graph, inputs):
        graphs.append(sum("softmax" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compile = functools.partial(torch.compile, backend=backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile)
        compiled = models.compiled(model, whole)
    with use_backend("reference"):
        images = [
            sample(m, torch.tensor([1]), seeds=torch.tensor([7]), steps=[2, 2]).latents
            for m in (model, compiled)
        ]
    assert torch.equal(*images)  # the backend runs the same ops
    attentions = [count for count in graphs if count]
    assert attentions == ([3, 3] if whole else [1, 1])  # of two stages with three blocks each


def test_table3_pairs_and_says_that_it_extrapolates():
    row = table3.measure("S", 0, config=TINY, peer=PEER, masked=MASKED, steps=8, timed_steps=3)
    assert row["ratio"]["median"] > 0 and row["multiply_adds"]["dit"] > 0
    text = table3.render({"rows": [row]})
    assert "Extrapolated: 3 steps" in text and "| B/2 |" in text and "4.6x" in text
    lines = [line for line in text.splitlines() if "MAR-B" in line]
    assert [line.split("|")[3].strip() for line in lines] == ["64", "256"]
    assert all("37.3x" in line and "106.9x" in line for line in lines)
    del row["mar_ratios"]  # as results from before MAR was measured
    assert "MAR" not in table3.render({"rows": [row]})


def test_table2_counts_what_the_paper_has_to_a_few_percent():
    rows = {row["model"]: row for row in table2.count()}
    assert rows["E-CAR-L"]["parameters"] == pytest.approx(859.2e6, rel=0.01)
    assert rows["DiT-XL/2"]["multiply_adds"] == pytest.approx(59.3e12, rel=0.01)


def test_memory_needed_is_of_the_largest_stage():
    found = memory.needed(TINY, 8)
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

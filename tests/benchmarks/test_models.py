"""Whole models to time, with tiny ones."""

import dataclasses
import functools

import pytest
import torch

from benchmarks import models, results
from benchmarks.models import StageTime
from ecar import ECAR, ECARConfig, sample
from ecar.info import count_multiply_adds
from ecar_kernels import use_backend
from ecar_kernels.costs import Rates

TINY = ECARConfig(
    stage_sides=(4, 8), channels=1, num_classes=3, width=16, heads=2, ar_layers=1, flow_blocks=1
)


def test_an_image_is_its_stages_and_their_steps():
    stages = [StageTime(1.0, 0.1), StageTime(2.0, 0.2)]
    assert models.image_seconds(stages, 5) == pytest.approx(1 + 3 * 0.1 + 2 + 2 * 0.2)


def test_floors_are_of_weights_products_and_launches():
    config, rates = ECARConfig.preset("S"), Rates(1e9, 1e12)
    one, two, eight = (
        models.floors(config, rates, steps=steps, batch=batch, itemsize=2, launch_seconds=1e-6)
        for steps, batch in (([1, 1, 1], 1), ([2, 1, 1], 1), ([1, 1, 1], 8))
    )
    model = ECAR(config)
    parts = (*model.heads, *[model.ar.blocks, model.ar.norm] * 3)
    weights = sum(p.numel() for part in parts for p in part.parameters())
    assert one["memory"] == eight["memory"] == pytest.approx(2 * weights / 1e9)
    step = sum(p.numel() for p in model.heads[0].blocks.parameters() if p.ndim == 2)
    assert two["memory"] - one["memory"] == pytest.approx(2 * step / 1e9)
    assert one["launches"] == pytest.approx(3 * 11e-6)
    products = sum(stage.total for stage in count_multiply_adds(config, steps=[1, 1, 1]))
    assert eight["arithmetic"] == 8 * one["arithmetic"] == pytest.approx(8 * products / 1e12)


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


def test_a_command_keeps_the_sizes_that_are_done(tmp_path, capsys):
    def measure(size, seconds):
        if size == "L":
            raise KeyboardInterrupt
        return {"rows": [{"size": size, "seconds": seconds}]}

    given = ["--seconds", "2", "--results", str(tmp_path)]
    how = {"seconds": 60, "arguments": given}
    with pytest.raises(SystemExit):
        models.main("paper.some", "About it.", measure, str, **how)
    (file,) = tmp_path.glob("*/some.json")
    rows = results.read(file)["rows"]
    assert [row["size"] for row in rows] == ["S", "B"]
    assert [row["seconds"] for row in rows] == [2, 6]  # by their shares
    # Another command measures one of them again, and leaves the other as it is.
    how["arguments"] = ["-k", "S", "--seconds", "7", "--results", str(tmp_path)]
    assert models.main("paper.some", "About it.", measure, lambda record: "a table", **how) == 0
    assert "a table" in capsys.readouterr().out
    assert results.read(file)["rows"] == [{"size": "S", "seconds": 7, "run": 0}, rows[1]]

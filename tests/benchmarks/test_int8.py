"""What eight bits could save and what they cost, with a tiny model."""

from pathlib import Path

import pytest
import torch

from benchmarks import int8, models, quality
from ecar import ECARConfig, sample
from tests.support.native import needs_native

TINY = ECARConfig(
    stage_sides=(4, 8), channels=1, num_classes=3, width=16, heads=2, ar_layers=1, flow_blocks=2
)
CPU_INFO = Path("/proc/cpuinfo")
FLAGS = set(CPU_INFO.read_text().split()) if CPU_INFO.exists() else set()


@pytest.mark.parametrize(("rounded", "numbers"), [(int8.by_output, 255), (int8.by_token, 256)])
def test_rounding_is_to_the_nearest_of_a_rows_numbers(rounded, numbers):
    x = torch.randn(5, 4000).add(torch.tensor([[0.0], [0.5], [-9.0], [40.0], [0.0]]))
    x[4] = 0
    x[:, 0] = 0
    found = rounded(x)
    assert found[:, 0].count_nonzero() == 0 and found[4].count_nonzero() == 0
    for row, its in zip(x[:4].double(), found[:4].double(), strict=True):
        steps = its.unique().diff()
        step = steps.min()
        assert len(its.unique()) <= numbers
        torch.testing.assert_close(steps / step, (steps / step).round(), atol=0.01, rtol=0)
        # Half a step; the row's ends may be another half beyond the numbers, for zero is one.
        assert (row - its).abs().max() <= 1.01 * step
        assert (row - its).abs().mean() <= 0.26 * step


def test_every_fused_product_of_an_image_is_rounded(monkeypatch):
    model, label, seen = models.random_model(TINY), torch.zeros(1, dtype=torch.int64), []
    before = sample(model, label, seeds=label, steps=[1, 1]).latents
    int8.round_products(model)
    rounded = int8.by_token
    monkeypatch.setattr(int8, "by_token", lambda x: seen.append(x.shape[-1]) or rounded(x))
    after = sample(model, label, seeds=label, steps=[1, 1]).latents
    blocks = 2 * (TINY.ar_layers + TINY.flow_blocks)  # at both stages
    assert len(seen) == 4 * blocks and seen.count(4 * TINY.width) == blocks
    assert 0 < (after - before).norm() / before.norm() < 0.1


@needs_native
def test_the_times_and_what_can_be_gained():
    (row,) = int8.measure_time("tiny", lambda: models.random_model(TINY), 0)["times"]
    assert row["model"] == "tiny" and row["seconds"].keys() == {"image", "linears"}
    assert all(found["median"] > 0 for found in row["seconds"].values())
    row["seconds"] = {"image": {"median": 4.0}, "linears": {"median": 3.0}}
    rates = [{"weights": 1e6, "tokens": 16, "bfloat16": 1e11, "int8": by * 1e11} for by in (1, 2)]
    assert int8.most_gained(row, rates) == 4 / 2.5
    text = " ".join(int8.render({"times": [row], "rates": rates}).split())
    assert "| tiny | 4.00 s | 75% | 1.60x |" in text
    assert "| 1,000,000 | 16 | 100 G/s | 200 G/s | 2.00x |" in text


@pytest.mark.skipif(
    not {"avx512_bf16", "avx512_vnni"} <= FLAGS, reason="this CPU multiplies no bfloat16 or int8"
)
def test_the_rates_are_of_both_sizes_and_formats():
    rates = int8.measure_rates()["rates"]
    assert [(rate["weights"], rate["tokens"]) for rate in rates] == [
        (weights, tokens) for weights in (36864, 400 * 36864) for tokens in (16, 256)
    ]
    assert all(1e9 < rate[way] < 1e13 for rate in rates for way in ("bfloat16", "int8"))


def test_a_checkpoints_images_in_each_format():
    images = int8.Images("digits", groups=2, images=80, latents=4)
    rows = [row for way in int8.FORMATS for row in images.measure(way)["rows"]]
    assert [row["format"] for row in rows] == list(int8.FORMATS)
    errors = [row["error"] for row in rows]
    assert errors[0] < min(errors[1:])
    assert all(row["measures"].keys() == quality.METRICS.keys() for row in rows)
    assert rows[0]["measures"]["read as asked"][0] > 0.9
    record = {"checkpoint": "digits", "groups": 2, "images": 80, "latents": 4, "rows": rows}
    text = " ".join(int8.render(record).split())
    assert f"| int8 in bfloat16 | {errors[3]:.3f} |" in text

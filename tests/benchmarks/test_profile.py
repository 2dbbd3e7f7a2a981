"""A step's profile adds up, and renders."""

import json

import pytest

from benchmarks import models, profile
from ecar import ECARConfig
from tests.support.native import needs_native

CONFIG = ECARConfig(
    stage_sides=(4, 8), channels=1, num_classes=3, width=32, heads=2, ar_layers=1, flow_blocks=1
)


def test_the_parts_add_up():
    model = models.accelerated(models.random_model(CONFIG))
    rows = [
        profile.stage_rows(head, CONFIG, stage, 3)
        for stage, head in enumerate(model.heads, start=1)
    ]
    assert [row["tokens"] for row in rows] == list(CONFIG.stage_tokens)
    for row in rows:
        assert row["ops"]["attention"] > 0
        assert sum(row["ops"].values()) + row[profile.BETWEEN] == pytest.approx(row["step"])
    text = profile.render({"size": "S", "stages": [row | {"bound": 0.25} for row in rows]})
    assert "| between the ops" in text and "| attention" in text
    assert "| as the sampler takes it | 250 ms | 250 ms |" in " ".join(text.split())


@needs_native
def test_the_command_says_and_writes_all_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile.ECARConfig, "preset", lambda size: CONFIG)
    profile.main(["--steps", "3", "--results", str(tmp_path)])
    assert "as the sampler takes it" in capsys.readouterr().out
    record = json.loads(next(tmp_path.glob("*/profile.json")).read_text())
    assert all(0 < stage["bound"] < 1 for stage in record["stages"])

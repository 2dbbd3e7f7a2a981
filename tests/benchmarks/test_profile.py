"""A step's profile adds up, and renders."""

import pytest

from benchmarks import models, profile
from ecar import ECARConfig

CONFIG = ECARConfig(stage_sides=(4, 8), channels=1, num_classes=3, width=32, heads=2, ar_layers=1,
                    flow_blocks=1)


def test_the_parts_add_up():
    model = models.accelerated(models.random_model(CONFIG))
    rows = [profile.stage_rows(head, CONFIG, stage, 3)
            for stage, head in enumerate(model.heads, start=1)]
    assert [row["tokens"] for row in rows] == list(CONFIG.stage_tokens)
    for row in rows:
        assert row["ops"]["attention"] > 0
        assert sum(row["ops"].values()) + row[profile.BETWEEN] == pytest.approx(row["step"])
    text = profile.render({"size": "S", "stages": rows})
    assert "| between the ops" in text and "| attention" in text

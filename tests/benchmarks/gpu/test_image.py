"""The rows of `make gpu-image`."""

import torch

from benchmarks import launches
from benchmarks.gpu import image
from ecar_kernels import costs


def test_rows_are_those_asked_for():
    """S, B and L in bfloat16 and TF32 at batch 1, 8 and 64, as a user has them and plain."""
    rows = {(row.size, row.numbers, row.batch, row.way) for row in image.ROWS}
    assert rows >= {
        (size, numbers, batch, way)
        for size in "SBL"
        for batch in (1, 8, 64)
        for numbers in ("bfloat16", "tf32")
        for way in ("default", "plain")
    }
    assert len(rows) == len(image.ROWS)
    assert image.ACCELERATED


def test_what_a_prediction_is_printed_next_to(monkeypatch):
    """On the chips that there are predictions for, of one image in bfloat16 as a user has it."""
    for chip in (*costs.CHIPS, "another chip"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda chip=chip: chip)
        for row in image.ROWS:
            for setting in image.SETTINGS:
                seconds = launches.predicted_seconds(row.size, setting, chip)
                assert (seconds is None) is (chip == "another chip")
                one = (row.batch, row.numbers, row.way) == (1, "bfloat16", "default")
                assert image._predicted(row, setting) == (seconds if one else None)

"""The rows of `make gpu-image`."""

from benchmarks.gpu import image


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

"""The microbenchmarks beside their targets."""

import pytest

from benchmarks import targets


def row(op, tokens, batch, ours, *, size="B", backward=False, floor=1.0, **others):
    return {
        "op": op,
        "size": size,
        "tokens": tokens,
        "batch": batch,
        "backward": backward,
        "floor_seconds": floor,
        "seconds": {name: {"median": time} for name, time in (others | {"ours": ours}).items()},
    }


@pytest.mark.parametrize(("ours", "marks"), [(1.2, ["met", "met"]), (1.3, ["MISSED", "MISSED"])])
def test_a_large_row_has_its_marks(ours, marks):
    text = targets.render(
        [
            {
                "rows": [
                    row("adaln", 256, 64, ours, eager=3.7, compiled=2.0),
                    row("adaln", 16, 1, 9.0, eager=1.0, compiled=9.0),
                ]
            }
        ]
    )
    lines = [line for line in text.splitlines() if line.startswith("| adaln ")]
    cells = [cell.strip() for cell in lines[0].split("|")]
    assert [cells[3], cells[5]] == marks


def test_what_is_slower_than_torch_compile_is_counted_and_named():
    text = targets.render(
        [
            {
                "rows": [
                    row("adaln", 16, 1, 1.0, eager=1.0, compiled=0.5),
                    row("adaln", 64, 8, 1.0, eager=1.0, compiled=2.0),
                    row("adaln", 64, 8, 1.0, backward=True, eager=1.0, compiled=1.25),
                ]
            },
            {
                "rows": [
                    row("adaln", 64, 8, 1.0, eager=1.0, compiled=0.9),
                    {"op": "adaln", "overhead": True, "seconds": {}},
                ]
            },
        ]
    )
    found = {
        cells[1]: cells[2:-1]
        for cells in ([cell.strip() for cell in line.split("|")] for line in text.splitlines())
        if cells[1:2] and cells[1].startswith("adaln")
    }
    assert found == {
        "adaln": ["3", "2", "0.50x", "B, 16 tokens, batch 1"],
        "adaln, backward": ["1", "none", "1.25x", "B, 64 tokens, batch 8"],
    }


def test_the_committed_results_are_told():
    assert "| stage_attention " in targets.of_devices()

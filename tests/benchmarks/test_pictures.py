"""Pictures of results: each kind that has one is drawn, and something can be seen."""

import pytest
from PIL import Image

from benchmarks import pictures, results
from tests.benchmarks import test_micro

FACTS = results.describe()
SUMMARY = {"median": 2.0, "q1": 1.5, "q3": 2.5}
RECORDS = {
    "micro": test_micro.record(
        test_micro.row(), test_micro.row(batch=2), test_micro.row(overhead=True)
    ),
    "end_to_end": {
        "runs": [FACTS],
        "rows": [{"size": "S", "seconds": dict.fromkeys(("eager", "ours", "linears"), SUMMARY)}],
    },
}
RECORDS["end_to_end"]["rows"][0]["seconds"]["attention"] = SUMMARY


@pytest.mark.parametrize("kind", pictures.PICTURES)
def test_each_kind_is_drawn(kind, tmp_path):
    file = tmp_path / "some-device" / f"{kind}.json"
    results.save(file, {"kind": kind, **RECORDS[kind]})
    (picture,) = pictures.draw(file, tmp_path / "out")
    assert picture == tmp_path / "out" / "some-device" / f"{kind}.png"
    with Image.open(picture) as image:
        assert image.width == int(pictures.DPI * pictures.WIDTH)
        low, high = image.convert("L").getextrema()
        assert low < 50 and high == 255


def test_what_has_no_picture_or_no_rows_is_not_drawn(tmp_path):
    for kind, rows in (("memory", []), ("micro", [])):
        file = tmp_path / "some-device" / f"{kind}.json"
        results.save(file, {"kind": kind, "runs": [], "rows": rows})
        assert list(pictures.draw(file, tmp_path)) == []


def test_the_ratios_drawn_are_medians_over_sizes(monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        pictures, "bars", lambda title, facts, groups, *_, **__: drawn.update(groups)
    )
    rows = [test_micro.row(), test_micro.row(batch=8, ours=1e-3), test_micro.row(batch=32)]
    pictures.ops(test_micro.record(*rows, test_micro.row(backward=True, ours=4e-3)))
    assert drawn == {
        "adaln": {"eager": 2.0, "torch.compile": 1.5},
        "adaln backward": {"eager": 1.0, "torch.compile": 0.75},
    }


def test_a_sheet_has_a_row_for_each_stage(monkeypatch):
    monkeypatch.setattr(pictures, "CHECKPOINTS", {"digits": [0, 1]})
    sheet = pictures.stages()
    side = 64 + 4
    assert sheet.mode == "RGB" and sheet.height == 2 * side + 4 and sheet.width > 2 * side + 4
    coarse, fine = (
        sheet.crop((sheet.width - side, y, sheet.width - 4, y + 64)) for y in (4, 4 + side)
    )
    assert len(coarse.getcolors()) <= 16 < len(fine.getcolors()) <= 64  # of 4 x 4 and 8 x 8


def test_losses_are_those_of_the_log(tmp_path):
    rows = ["step,images,loss_1,loss_2", "10,640,0.5,0.25", "20,1280,0.125,0.0625"]
    (tmp_path / "log.csv").write_text("\n".join(rows) + "\n")
    (axes,) = pictures.losses([tmp_path / "log.csv"]).axes
    first, second = axes.get_lines()
    assert list(first.get_xdata()) == [640, 1280] and list(first.get_ydata()) == [0.5, 0.125]
    assert list(second.get_ydata()) == [0.25, 0.0625]
    assert axes.get_ylabel() == tmp_path.name

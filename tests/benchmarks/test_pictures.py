"""Pictures of results: what is drawn, that both files say of what, and that it can be seen."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import environment, pictures
from benchmarks.pictures import bars, rows, stages, style
from benchmarks.pictures.__main__ import stray, update

FACTS = environment.describe()


def summary(median):
    return {
        "rounds": 5,
        "min": median,
        "q1": 0.9 * median,
        "median": median,
        "q3": 1.1 * median,
        "max": median,
    }


def micro_row(op, batch=1, backward=False, multiply_adds=0, **seconds):
    return {
        "op": op,
        "size": "S",
        "tokens": 16,
        "batch": batch,
        "backward": backward,
        "bytes": 1000 * batch,
        "multiply_adds": multiply_adds,
        "failures": {},
        "seconds": {
            name: summary(value) if isinstance(value, float) else value
            for name, value in seconds.items()
        },
    }


MICRO = {
    "kind": "micro",
    "environment": FACTS,
    "rates": {"bytes_per_second": 1e9, "multiply_adds_per_second": 1e10},
    "rows": [
        micro_row("adaln", ours=1e-6, eager=4e-6, compiled=2e-6),
        micro_row("adaln", batch=8, ours=1e-6, eager=6e-6, compiled=2e-6),
        micro_row("adaln", backward=True, ours=1e-6, eager=0.5e-6),
        # A peer may have a reason in the place of times, and names that no one thought of.
        micro_row(
            "stage_attention",
            multiply_adds=5000,
            ours=1e-6,
            **{"flash-attn": "flash-attn: not installed", "SDPA math": 3e-6},
        ),
        {"op": "adaln", "overhead": True, "seconds": {"ours": summary(1e-6)}},
    ],
}
GPU = {
    "kind": "gpu",
    "environment": FACTS | {"gpu": {"name": "NVIDIA H100", "CUDA": "13.0", "driver": "580"}},
    "parts": {
        "rates": {
            "rows": [
                {"name": "copy", "value": 3e12, "unit": "bytes/s"},
                {"name": "bfloat16", "value": 4e14, "unit": "multiply-adds/s"},
            ]
        },
        "micro": {
            "rows": [
                {
                    "op": "adaln",
                    "size": "S",
                    "tokens": 256,
                    "batch": 1,
                    "group": "eager",
                    "sets": 2,
                    "variants": {
                        "reference": {"median": 9e-6, "how": "graph"},
                        "triton": {"median": 3e-6, "how": "graph"},
                    },
                    "failed": {},
                    "bytes": 1_000_000,
                    "multiply_adds": 0,
                },
                {
                    "op": "adaln",
                    "size": "S",
                    "tokens": 16,
                    "batch": 1,
                    "group": "eager",
                    "sets": 2,
                    "failed": {"triton": "no"},
                    "bytes": 1_000_000,
                    "multiply_adds": 0,
                },
            ]
        },
    },
}


@pytest.fixture
def record(tmp_path):
    """Writes a record as a file of results."""

    def write(content, name, device="some-device"):
        file = tmp_path / device / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
        return file

    return write


def test_ratios_are_those_of_the_rows():
    data = bars.data(MICRO)
    assert data["ratios"]["forward"]["adaln"]["eager"] == pytest.approx([4, 6])
    assert data["ratios"]["forward"]["adaln"]["torch.compile"] == pytest.approx([2, 2])
    assert data["ratios"]["backward"] == {"adaln": {"eager": [pytest.approx(0.5)]}}
    assert data["ratios"]["forward"]["stage_attention"].keys() == {"SDPA math"}
    assert data["note"].endswith("batch 1, 8")


def test_what_auto_takes_is_ours_on_a_gpu():
    found = rows.rows(GPU)
    assert [row.seconds for row in found] == [{"eager": 9e-6, "ours": 3e-6}]
    assert rows.rates(GPU) == {"bytes": 3e12, "multiply_adds": 4e14}
    assert bars.data(GPU)["device"] == "NVIDIA H100"


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (MICRO, ["micro-bars", "micro-roofline"]),
        (GPU, ["gpu-bars", "gpu-roofline"]),
        (MICRO | {"rows": []}, []),
        (GPU | {"parts": {}}, []),
        (MICRO | {"kind": "saved"}, []),
    ],
    ids=["micro", "gpu", "empty", "gpu cut off", "of another kind"],
)
def test_a_record_is_drawn_as_png_and_svg(content, names, record, tmp_path):
    found = list(pictures.of_file(record(content, content["kind"])))
    assert [picture.name for picture in found] == [f"some-device/{name}" for name in names]
    for picture in found:
        assert not picture.is_in(tmp_path)
        picture.write(tmp_path)
        assert picture.is_in(tmp_path)
        with Image.open(tmp_path / f"{picture.name}.png") as image:
            assert image.width == 200 * style.WIDTH
            low, high = image.convert("L").getextrema()
            assert low < 50 and high == 255


@pytest.mark.parametrize("suffix", pictures.SUFFIXES)
def test_a_picture_of_other_figures_is_seen(suffix, record, tmp_path):
    picture = next(pictures.of_file(record(MICRO, "micro")))
    picture.write(tmp_path)
    old = (tmp_path / f"{picture.name}{suffix}").read_bytes()
    faster = json.loads(json.dumps(MICRO).replace("4e-06", "5e-06"))
    other = next(pictures.of_file(record(faster, "micro")))
    assert not other.is_in(tmp_path)
    other.write(tmp_path)
    assert other.is_in(tmp_path)
    (tmp_path / f"{picture.name}{suffix}").write_bytes(old)
    assert not other.is_in(tmp_path)


def test_the_same_data_give_the_same_bytes(record, tmp_path):
    picture = next(pictures.of_file(record(MICRO, "micro")))
    picture.write(tmp_path / "a")
    picture.write(tmp_path / "b")
    for suffix in pictures.SUFFIXES:
        a, b = ((tmp_path / folder / f"{picture.name}{suffix}").read_bytes() for folder in "ab")
        assert a == b
        assert b"matplotlib.org" not in a  # nor a version, nor a date
        assert b"<dc:date>" not in a


def test_updating_draws_what_is_missing_and_removes_what_is_of_nothing(
    record, tmp_path, monkeypatch
):
    file = record(MICRO, "micro")
    monkeypatch.setattr(pictures, "committed", lambda: pictures.of_file(file))
    folder = tmp_path / "images"
    assert [path.name for path in update(folder)] == ["micro-bars", "micro-roofline"]
    assert update(folder) == []
    (folder / "some-device" / "micro-roofline.svg").unlink()
    shutil.copy(folder / "some-device" / "micro-bars.png", folder / "some-device" / "old.png")
    assert [path.name for path in stray(folder)] == ["old.png"]
    assert [path.name for path in update(folder)] == ["micro-roofline", "old.png"]
    assert stray(folder) == []


@pytest.mark.skipif(
    not (stages.ROOT / "checkpoints").exists(), reason="an sdist has no checkpoints"
)
def test_the_stages_are_of_the_checkpoints_as_they_are(tmp_path, monkeypatch):
    before = stages.data()
    for name in stages.CHECKPOINTS:
        shutil.copytree(Path(stages.ROOT) / "checkpoints" / name, tmp_path / "checkpoints" / name)
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    assert stages.data() == before
    with (tmp_path / "checkpoints" / "mnist" / "config.json").open("a") as file:
        file.write("\n")
    assert stages.data() != before


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.5, 200, [1, 10, 100]),
        (0.8, 45, [1, 3, 10, 30]),
        (0.9, 6, [1, 2, 5]),
        (0.95, 1.6, [1, 1.2, 1.5]),
        (0.004, 0.2, [0.01, 0.03, 0.1]),
    ],
)
def test_ticks_are_few_and_plain(low, high, ticks):
    assert style.steps(low, high) == pytest.approx(ticks)

"""`ecar sample` into a folder: written as drawn, gone on with, shared, and what its PNGs say."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from ecar.pipeline import ECARPipeline

SHORT = "sample --checkpoint model --no-progress --classes 0-2 --per-class 2 --batch-size 2"


def test_a_png_says_what_it_was_drawn_with(folder, pipe, run):
    run(f"{SHORT} --steps 1,3 --guidance 2 --output out/")
    text = Image.open("out/class2-seed000012.png").text
    assert text["Software"].startswith("ecar ")
    expected = {"checkpoint": "model", "class": "2", "class_name": "two", "seed": "12"}
    expected |= {"steps": "[1, 3]", "guidance": "2.0", "dtype": "float32"}
    assert expected.items() <= text.items()
    again = pipe(
        int(text["class"]), json.loads(text["steps"]), json.loads(text["guidance"]),
        seeds=int(text["seed"]), progress=False,
    )  # fmt: skip
    difference = np.asarray(Image.open("out/class2-seed000012.png")).astype(int) - again.images[0]
    assert abs(difference).max() <= 1
    run(f"{SHORT} --output x.png")
    text = Image.open("x.png").text
    assert (text["class"], text["seed"]) == ("0, 0, 1, 1, 2, 2", "0, 10, 1, 11, 2, 12")
    run(f"{SHORT} --output x.jpg")  # has no such text


def files_in(folder):
    """Each file's content, and when it was written."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_images_are_written_as_they_are_drawn_and_drawn_once(folder, run, monkeypatch):
    run(f"{SHORT} --output whole/")
    plain, calls = ECARPipeline.__call__, []

    def interrupted(self, *arguments, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(options["seeds"])
        return plain(self, *arguments, **options)

    monkeypatch.setattr(ECARPipeline, "__call__", interrupted)
    assert run(f"{SHORT} --output out/")[0] == 130
    first = files_in(folder / "out")
    assert len(first) == 4
    calls.clear()
    code, output, _ = run(f"{SHORT} --output out/")
    assert (code, calls) == (0, [[2, 12]])
    assert "(2 images in" in output and "4 were there already" in output
    both = files_in(folder / "out")
    assert first.items() <= both.items()
    assert {name: data for name, (data, _) in both.items()} == {
        name: data for name, (data, _) in files_in(folder / "whole").items()
    }
    code, output, _ = run(f"{SHORT} --output out/")
    assert code == 0 and "(0 images in" in output
    assert files_in(folder / "out") == both


def other_weights_of_the_same_name(folder):
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors["ar.positions"] += 1e-3
    save_file(tensors, folder / "model" / "model.safetensors")


def a_broken_file(folder):
    for path in (folder / "out").iterdir():
        path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize(
    ("options", "change", "redrawn"),
    [
        ("", None, 0),
        ("--batch-size 5 --sheet 3x2", None, 0),
        ("--per-class 3", None, 3),
        ("--steps 6", None, 6),
        ("--solver euler", None, 6),
        ("--guidance 3", None, 6),
        ("--dtype bfloat16", None, 6),
        ("--scale 2", None, 6),
        ("--stages", None, 6),
        ("", other_weights_of_the_same_name, 6),
        ("", a_broken_file, 6),
        ("", lambda folder: (folder / "model").rename(folder / "moved"), 0),
    ],
)
def test_only_images_of_the_same_weights_and_settings_are_kept(
    folder, run, options, change, redrawn
):
    line = f"{SHORT} --output out/"
    run(line)
    if change is not None:
        change(folder)
    if (folder / "moved").exists():
        line = line.replace("model", "moved")
    code, output, _ = run(f"{line} {options}")
    assert code == 0
    assert f"({redrawn} images in" in output


def test_processes_draw_each_image_once(folder, run, monkeypatch):
    run(f"{SHORT} --output alone/")
    monkeypatch.setenv("WORLD_SIZE", "4")
    counts = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        code, output, _ = run(f"{SHORT} --output out/")
        assert code == 0
        assert bool(output) == (rank == 0)
        counts.append(len(files_in(folder / "out")))
    assert counts == [2, 4, 5, 6]
    assert {name: data for name, (data, _) in files_in(folder / "out").items()} == {
        name: data for name, (data, _) in files_in(folder / "alone").items()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--output x.png", "--output: 2 processes need a folder"),
        ("--output out/ --sheet 2x2", "--sheet: is drawn by one process"),
        ("--output out/ --strip --stages", "--strip: is drawn by one process"),
    ],
)
def test_what_several_processes_cannot_draw(folder, refused, monkeypatch, options, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(f"sample --checkpoint model {options}").startswith(message)

"""`ecar sample`: sheets and folders of images; what is wrong is one line, and nothing written."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL  # here: of torchao it may print a line, once
from PIL import Image
from safetensors.torch import load_file, save_file

from ecar.codec import AutoencoderKLCodec
from ecar.pipeline import ECARPipeline


def cells(path, rows, columns, side, padding=2):
    """The pictures of a sheet, [rows, columns, side, side]."""
    sheet = np.asarray(Image.open(path))
    step = side + padding
    assert sheet.shape == (rows * step + padding, columns * step + padding)
    inner = sheet[padding:, padding:].reshape(rows, step, columns, step).swapaxes(1, 2)
    assert not inner[:, :, side:].any()
    assert not inner[:, :, :, side:].any()
    return inner[:, :, :side, :side]


def test_sheet_has_a_row_for_each_class_and_noise_of_its_own_for_each_image(folder, pipe, run):
    code, output, errors = run("sample --checkpoint model --output sheet.png --guidance 2")
    assert code == 0
    path, seconds, backends = output.splitlines()
    assert path == "sheet.png"
    assert re.match(r"[\d.e-]+ s per image \(100 images in [\d.e-]+ s on (cpu|cuda)", seconds)
    assert backends.startswith("backends: ")
    assert "stage_attention" in backends
    assert "4/4" in errors  # the progress bar
    sheet = cells("sheet.png", 10, 10, 8)
    for number, index in ((0, 0), (3, 7), (9, 2)):
        seed = 10 * index + number
        picture = pipe(number, 4, 2.0, seeds=seed, progress=False).images[0]
        difference = np.asarray(picture).astype(int) - sheet[number, index]
        assert abs(difference).max() <= 1  # one level, for rounding at another batch size


def test_chosen_classes_seeds_scale_and_stages(folder, run):
    line = "sample --checkpoint model --classes three,7-8 --seed 5 --per-class 2 --no-progress"
    code, _, errors = run(f"{line} --stages --scale 3 --output x.png")
    assert (code, errors) == (0, "")
    assert sorted(path.name for path in folder.glob("*.png")) == ["x-stage1.png", "x.png"]
    sheet, ends = cells("x.png", 3, 2, 24), cells("x-stage1.png", 3, 2, 24)
    assert np.array_equal(sheet[:, :, ::3, ::3].repeat(3, 2).repeat(3, 3), sheet)
    assert np.array_equal(ends[:, :, ::6, ::6].repeat(6, 2).repeat(6, 3), ends)
    run(f"{line} --seed 15 --output y.png")  # ten classes further
    assert np.array_equal(cells("y.png", 3, 2, 8)[:, 0], sheet[:, 1, ::3, ::3])
    run(f"{line.replace('--seed 5 --per-class 2', '--seeds 8,18')} --output z.png")
    assert np.array_equal(cells("z.png", 3, 2, 8)[0], sheet[0, :, ::3, ::3])


def test_names_of_the_rows_and_a_strip_of_the_stages(folder, run):
    line = "sample --checkpoint model --classes three,7 --per-class 3 --scale 4 --no-progress"
    code, _, errors = run(f"{line} --strip --output x.png")
    assert (code, errors) == (0, "")
    assert sorted(path.name for path in folder.glob("*.png")) == ["x-strip.png", "x.png"]
    strip = cells("x-strip.png", 2, 2, 32)  # two stages
    assert np.array_equal(strip[:, 1], cells("x.png", 2, 3, 32)[:, 0])
    run(f"{line} --stages --output y.png")
    assert np.array_equal(strip[:, 0], cells("y-stage1.png", 2, 3, 32)[:, 0])
    run(f"{line} --names --strip --stages --output out/")
    names = ["sheet-strip.png"]
    assert sorted(path.name for path in (folder / "out").glob("sheet*")) == names
    named = np.asarray(Image.open("out/sheet-strip.png"))
    plain = np.asarray(Image.open("x-strip.png"))
    assert np.array_equal(named[:, -plain.shape[1] :], plain)
    assert named[:, : -plain.shape[1]].max() > 128


def test_folders_are_made(folder, run):
    line = "sample --checkpoint model --classes 0 --per-class 1 --no-progress --output"
    for output, file in (("a/b/x.png", "a/b/x.png"), ("c/d/", "c/d/class0-seed000000.png")):
        assert run(f"{line} {output}")[0] == 0
        assert (folder / file).is_file()


def test_batches_change_no_image(folder, run):
    line = "sample --checkpoint model --sheet 3x3 --no-progress --output"
    run(f"{line} one.png")
    run(f"{line} many.png --batch-size 2")
    one, many = (cells(name, 3, 3, 8).astype(int) for name in ("one.png", "many.png"))
    assert abs(one - many).max() <= 1


def test_a_lone_image_has_no_frame(folder, run):
    run("sample --checkpoint model --classes 4 --seeds -3 --output one.png")
    assert Image.open("one.png").size == (8, 8)


def test_folder_gets_a_file_for_each_image(folder, run):
    code, output, _ = run("sample --checkpoint model --sheet 2x2 --stages --output out/")
    assert code == 0
    assert output.splitlines()[0] == "out"
    names = sorted(path.name for path in (folder / "out").iterdir())
    images = [
        f"class{number}-seed{10 * index + number:06d}{stage}.png"
        for number in range(2)
        for index in range(2)
        for stage in ("", "-stage1")
    ]
    assert names == sorted([*images, "sheet.png", "sheet-stage1.png"])
    sheet = cells("out/sheet.png", 2, 2, 8)
    assert np.array_equal(np.asarray(Image.open("out/class1-seed000001.png")), sheet[1, 0])
    run("sample --checkpoint model --sheet 2x2 --stages --output x.png")
    for suffix in ("", "-stage1"):
        assert np.array_equal(
            np.asarray(Image.open(f"x{suffix}.png")),
            np.asarray(Image.open(f"out/sheet{suffix}.png")),
        )


def test_settings_reach_the_sampler(folder, run):
    pictures = set()
    for options in (
        "",
        "--steps 1,3",
        "--solver heun",
        "--solver euler",
        "--grid 1",
        "--steps paper",
        "--guidance 3",
        "--guidance 3 --guidance-schedule linear",
        "--guidance 3 --guidance-interval 0.1,1",
    ):
        code, *_ = run(f"sample --checkpoint model --classes 1 --per-class 1 {options}")
        assert code == 0
        pictures.add(np.asarray(Image.open("samples.png")).tobytes())
    assert len(pictures) == 9


@pytest.mark.parametrize("options", ["--dtype bfloat16", "--backend reference", "--device cpu"])
def test_where_and_how_it_runs(folder, run, options):
    code, output, _ = run(f"sample --checkpoint model --sheet 1x1 {options}")
    assert code == 0
    if "reference" in options:
        assert "backends: reference (stage_attention, " in output
        assert ", in float32)" in output


@pytest.mark.parametrize("reason", [None, "it widens it"])
def test_auto_is_the_format_that_this_cpu_multiplies(folder, run, monkeypatch, reason):
    monkeypatch.setattr("ecar.hub.why_not_bfloat16", lambda: reason)
    chosen = "bfloat16" if reason is None else "float32"
    line = "sample --checkpoint model --sheet 1x1 --device cpu"
    for dtype, name in (("auto", "a.png"), (chosen, "b.png")):
        _, output, _ = run(f"{line} --dtype {dtype} --output {name}")
        assert f", in {chosen})" in output
    found, expected = (np.asarray(Image.open(folder / name)) for name in ("a.png", "b.png"))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--classes 10", "--classes: expected classes from 0 to 9, got 10"),
        ("--classes 3,-1", "--classes: expected classes from 0 to 9, got -1"),
        ("--classes sevn", "--classes: no class is named 'sevn'; near it: seven"),
        ("--classes 1,,2", "--classes: expected class numbers or names .*'1,,2'"),
        ("--classes 5-3", "--classes: expected a range such as 3-5, got '5-3'"),
        ("--classes 1,2 --sheet 3x3", "--classes: expected 3 classes .*, got 2"),
        ("--sheet 11x3", "--sheet: expected at most 10 rows, .*got 11"),
        ("--sheet 3", "--sheet: expected ROWSxCOLUMNS such as 10x8, got '3'"),
        ("--sheet 0x3", "--sheet: expected ROWSxCOLUMNS such as 10x8, got '0x3'"),
        ("--seeds 1,2 --sheet 3x3", "--seeds: expected 3 seeds .*, got 2"),
        ("--seeds 1,x", "--seeds: expected whole numbers .*'x'"),
        ("--seeds 1.5", "--seeds: expected whole numbers .*'1.5'"),
        ("--seeds 9223372036854775808", "--seeds: expected int64 numbers, got 92233720368547758"),
        ("--seeds 1 --seed 2", "--seeds: lists all seeds"),
        ("--seed x", "--seed: invalid int value: 'x'"),
        ("--seed 9223372036854775800", "--seed: expected int64 numbers, got 92233720368547758"),
        ("--output out/ --strip", "--strip: in a folder, .*--stages"),
        ("--per-class 0", "--per-class: expected a positive whole number, got '0'"),
        ("--per-class 2 --sheet 3x3", "--per-class: expected 3, .*got 2"),
        ("--steps 0", "--steps: expected a positive whole number.*'0'"),
        ("--steps=-4", "--steps: expected a positive whole number.*'-4'"),
        ("--steps 4.5", "--steps: expected a positive whole number.*'4.5'"),
        ("--steps 3,0", "--steps: expected a positive whole number.*'3,0'"),
        ("--steps 1,2,3", r"--steps: expected a list of 2 numbers.*\[1, 2, 3\]"),
        ("--steps 1", "--steps: expected at least one step for each of 2 stages, got 1"),
        ("--steps papers", "--steps: expected .* or paper, got 'papers'"),
        ("--steps paper --solver ab2", "--solver: expected 'euler' or none .*, got 'ab2'"),
        ("--steps paper --grid 2", "--grid: expected 1.0 or none .*, got 2.0"),
        ("--solver rk4", "--solver: invalid choice: 'rk4'"),
        ("--guidance nan", "--guidance: expected a finite number, got nan"),
        ("--guidance-interval 0.5", "--guidance-interval: expected two numbers.*'0.5'"),
        ("--guidance-interval 0.5,0.1", "--guidance-interval: expected 0 <= low <= high <= 1"),
        ("--output file/further/x.png", "output folder .*file: is not a folder"),
        ("--output file/further/", "output folder .*file: is not a folder"),
        ("--output file/x.png", "output folder file: is not a folder"),
        ("--output file", "output folder file: is not a folder"),
        ("--output /proc/self/x.png", "output folder /proc/self: not writable"),
        ("--output x.xyz", "output file x.xyz: expected a picture's suffix .*'.xyz'"),
        ("--device gpu", "--device: cannot use 'gpu' here"),
        ("--device meta", "--device: 'meta' holds no values"),
        ("--backend fast", "--backend: invalid choice: 'fast'"),
        ("--backend triton", "backend 'triton' cannot serve"),
        ("--dtype int8", "--dtype: invalid choice: 'int8'"),
        ("--batch-size 0", "--batch-size: expected a positive whole number, got '0'"),
        ("--scale 0", "--scale: expected a positive whole number, got '0'"),
        ("--colour", "unrecognized arguments: --colour"),
        ("--check model", "unrecognized arguments: --check model"),
    ],
)
def test_bad_sample_is_one_line(folder, refused, options, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (folder / "file").write_text("no folder")
    assert re.search(message, refused(f"sample --checkpoint model {options}"))


def test_cuda_that_is_not_there_is_one_line(folder, refused):
    assert refused("sample --checkpoint model --device cuda:99").startswith(
        "--device: cannot use 'cuda:99' here"
    )


def test_existing_output_is_kept_where_the_command_is_refused(folder, refused):
    (folder / "samples.png").write_bytes(b"from before")
    refused("sample --checkpoint model --classes 10")
    assert (folder / "samples.png").read_bytes() == b"from before"


def damage_config(folder):
    (folder / "config.json").write_text('{"stage_sides": [4, 8], "colour": 3}')


def damage_json(folder):
    (folder / "config.json").write_text("{")


def cut_weights(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def pickle_weights(folder):
    torch.save({"a": torch.zeros(1)}, folder / "model.safetensors")


def other_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "ar_layers": 3}))


def nan_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["ar.positions"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_vae(folder):
    (folder / "pipeline.json").write_text('{"codec": "autoencoder_kl"}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config, "config 'colour': no such field"),
        (damage_json, "config.json.*not valid JSON"),
        (cut_weights, "model.safetensors: not a safetensors file, or cut short"),
        (pickle_weights, "model.safetensors: not a safetensors file, or cut short"),
        (other_weights, "model.safetensors: of another configuration.*ar.blocks.2"),
        (nan_weights, "model.safetensors: tensor 'ar.positions' holds NaN"),
        (no_weights, "checkpoint 'model': no file model.safetensors"),
        (no_vae, "VAE folder model/vae: holds no config.json"),
    ],
)
def test_bad_checkpoint_is_one_line(folder, refused, damage, message):
    damage(folder / "model")
    assert re.search(message, refused("sample --checkpoint model"))


def test_missing_extra_is_one_line(folder, refused, monkeypatch):
    no_vae(folder / "model")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install ecar[vae]" in refused("sample --checkpoint model")


def test_states_that_are_not_finite_are_one_line(folder, refused, make_model):
    model = make_model()
    with torch.no_grad():
        model.heads[1].output.bias.fill_(torch.finfo(torch.float32).max)
    model.save_pretrained(folder / "model")
    line = "sample --checkpoint model --no-progress --sheet 1x1 --dtype bfloat16 --guidance 9"
    assert "not finite" in refused(line)


def test_a_vae_is_used(tmp_path, make_model, run):
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
    )
    pipe = ECARPipeline(make_model(channels=4), AutoencoderKLCodec(vae))
    pipe.save_pretrained(tmp_path / "model")
    code, *_ = run("sample --checkpoint model --steps 2 --classes 1 --seeds 1 --output a.png")
    assert code == 0
    picture = pipe(1, 2, seeds=1, progress=False).images[0]
    assert picture.size == (16, 16)
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(picture))

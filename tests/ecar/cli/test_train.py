"""`ecar train`: flags from TrainConfig, resume, and what is refused before anything is written."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from ecar.cli.train import FIELD_FLAGS, MODEL_FLAGS, field_texts
from ecar.codec import AutoencoderKLCodec
from ecar.config import ECARConfig
from ecar.data import cache_latents
from ecar.pipeline import ECARPipeline
from ecar.training import TrainConfig

NEW = "train --config tiny.json --no-progress --device cpu --num-workers 0"


@pytest.fixture
def here(tmp_path):
    """The working folder, which holds the start of a tiny training."""
    model = {
        "stage_sides": [4, 8],
        "channels": 1,
        "num_classes": 10,
        "width": 32,
        "heads": 2,
        "ar_layers": 1,
        "flow_blocks": 1,
    }
    values = {
        "model": model,
        "batch_size": 4,
        "steps": 2,
        "log_every": 1,
        "save_every": 1,
        "sample_every": 0,
        "sample_guidance": 1.5,
    }
    (tmp_path / "tiny.json").write_text(json.dumps(values))
    return tmp_path


def test_every_field_has_a_flag_and_a_text():
    fields = {field.name for field in dataclasses.fields(TrainConfig)} - {"model"}
    assert FIELD_FLAGS.keys() == fields
    assert all(field_texts(TrainConfig).get(name) for name in fields)
    assert MODEL_FLAGS.keys() == {field.name for field in dataclasses.fields(ECARConfig)}
    assert all(field_texts(ECARConfig).get(name) for name in MODEL_FLAGS)


def test_any_field_of_the_model_takes_its_place_in_the_file(here, run):
    code, _, errors = run(
        f"{NEW} --output out --model.stage_sides 2,4,8 --model.width 16 --model.heads 4 "
        "--model.mlp_ratio 2.5 --model.class_dropout 0.2 --model.ar_layers=2 --flow-blocks 2"
    )
    assert (code, errors) == (0, "")
    model = TrainConfig.from_json(here / "out" / "train.json").model
    assert (model.stage_sides, model.width, model.heads) == ((2, 4, 8), 16, 4)
    assert (model.mlp_ratio, model.class_dropout) == (2.5, 0.2)
    assert (model.ar_layers, model.flow_blocks, model.channels) == (2, 2, 1)


def test_trains_and_resumes_to_a_checkpoint_that_samples(here, run):
    code, output, errors = run(f"{NEW} --output runs/new")
    assert (code, errors) == (0, "")
    assert output.splitlines()[0] == "runs/new"
    assert "2 steps in " in output
    pipe = ECARPipeline.from_pretrained(here / "runs" / "new")
    assert pipe.class_names == [str(digit) for digit in range(10)]
    assert pipe.defaults["guidance_scale"] == 1.5
    code, output, errors = run("train --resume runs/new --steps 3 --no-progress")
    assert (code, errors) == (0, "")
    assert "3 steps in " in output
    code, *_ = run("sample --checkpoint runs/new --sheet 2x2 --steps 2 --output x.png")
    assert code == 0


def test_flags_take_the_place_of_the_file_s_fields(here, run):
    code, *_ = run(
        f"{NEW} --output-dir out --betas 0.8,0.95 --stage-weights 1,2 --grad-clip none "
        "--learning-rate 3e-4 --no-tf32 --label-dropout 0.25 --schedule cosine --dataset digits"
    )
    assert code == 0
    config = TrainConfig.from_json(here / "out" / "train.json")
    assert (config.batch_size, config.betas, config.stage_weights) == (4, (0.8, 0.95), (1.0, 2.0))
    assert (config.grad_clip, config.learning_rate, config.tf32) == (None, 3e-4, False)
    assert (config.label_dropout, config.schedule) == (0.25, "cosine")


def test_what_an_ablation_changes(here, run):
    code, *_ = run(
        f"{NEW} --output out --ar-layers 0 --flow-blocks 2 --width 32 --heads 4 --patch-size 4 "
        "--stage-weights uncertainty --tau logit-normal --ema-decay 0.999,0.9"
    )
    assert code == 0
    config = TrainConfig.from_json(here / "out" / "train.json")
    model = config.model
    assert (model.ar_layers, model.flow_blocks, model.width) == (0, 2, 32)
    assert (model.heads, model.patch_size) == (4, 4)
    assert (config.stage_weights, config.tau) == ("uncertainty", "logit-normal")
    assert ECARPipeline.from_pretrained(here / "out" / "ema_0.9").model.config == model
    code, _, errors = run(f"{NEW} --output other --ar-layers 0")
    assert code == 2
    assert "--stage-weights: expected 'uncertainty' or 2 numbers" in errors


def test_a_preset_gives_the_sizes(here, run):
    code, *_ = run(f"{NEW} --preset digits --steps 1 --batch-size 2 --output out")
    assert code == 0
    config = ECARConfig.from_json(here / "out" / "config.json")
    assert config == ECARConfig.preset("digits")


def test_latents_with_their_vae(here, run):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
    )
    codec = AutoencoderKLCodec(vae)
    codec.save(here / "vae")
    images = [(torch.rand(3, 16, 16) * 2 - 1, label) for label in range(3) for _ in range(4)]
    cache_latents(Images(images), codec, here / "latents")
    values = json.loads((here / "tiny.json").read_text())
    values["model"].update(channels=4, num_classes=3)
    (here / "tiny.json").write_text(json.dumps({**values, "sample_every": 2, "sample_steps": 2}))
    options = "--vae vae --dataset latents --data-root latents --keep-last 1"
    code, _, errors = run(f"{NEW} {options} --output out")
    assert (code, errors) == (0, "")
    sheet = Image.open(here / "out" / "samples" / "step_0000002.png")
    assert sheet.mode == "RGB"
    pipe = ECARPipeline.from_pretrained(here / "out")
    assert pipe(2, 2, progress=False).images[0].size == (16, 16)
    kept = ECARPipeline.from_pretrained(here / "out" / "checkpoints" / "step_0000002")
    assert kept(2, 2, progress=False).images[0].size == (16, 16)
    # Resumed, it finds the VAE that the sheets need.
    code, *_ = run("train --resume out --steps 4 --no-progress")
    assert code == 0
    assert Image.open(here / "out" / "samples" / "step_0000004.png").mode == "RGB"
    assert ECARPipeline.from_pretrained(here / "out")(2, 2, progress=False).images[0].size[0] == 16
    # A preset takes its sizes from the cache.
    code, *_ = run(f"{NEW} --preset digits {options} --output sized")
    assert code == 0
    config = ECARConfig.from_json(here / "sized" / "config.json")
    assert (config.channels, config.num_classes, config.stage_sides) == (4, 3, (4, 8))
    assert config.width == ECARConfig.preset("digits").width


def test_a_preset_takes_the_classes_of_a_folder(here, run):
    for name in ("robin", "wren"):
        (here / "birds" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), "red").save(here / "birds" / name / "0.png")
    options = "--preset digits --dataset folder --data-root birds --steps 1 --batch-size 2"
    code, *_ = run(f"{NEW} {options} --output out")
    assert code == 0
    config = ECARConfig.from_json(here / "out" / "config.json")
    assert config == ECARConfig.preset("digits", num_classes=2)
    code, *_ = run(f"{NEW} {options} --channels 3 --image-size 16 --output sized")
    assert code == 0
    config = ECARConfig.from_json(here / "sized" / "config.json")
    assert (config.channels, config.num_classes, config.stage_sides) == (3, 2, (8, 16))
    code, output, _ = run("info --config sized/train.json")
    assert code == 0
    assert "3 channels" in output and "2 classes" in output
    assert run("info --config sized/config.json")[1].splitlines()[1:] == output.splitlines()[1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--output x --batch-size 0", "--batch-size: expected an integer of at least 1, got 0"),
        ("--output x --steps 1.5", "--steps: expected a whole number, got '1.5'"),
        ("--output x --learning-rate nan", "--learning-rate: expected a finite number"),
        ("--output x --schedule step", "--schedule: expected one of constant, linear, cosine, wsd"),
        ("--output x --betas 0.9", "--betas: expected two numbers"),
        (
            "--output x --stage-weights 1,2,3",
            "--stage-weights: expected 'gradnorm', 'uncertainty' or 2 numbers",
        ),
        (
            "--output x --dataset birds",
            "--dataset: expected one of digits, mnist, emoji, folder, shards, latents or a path",
        ),
        ("--output x --dataset emojy", "'emojy'; near it: emoji"),
        ("--output x --dataset ./nowhere", "./nowhere: no such folder"),
        ("--output x --dataset empty --data-root y", "--data-root: --dataset empty says where"),
        ("--output x --dataset a.tar b.tar", "quote a pattern, as in --dataset"),
        ("--output x --dataset folder", "--data-root: the data set 'folder' needs a folder"),
        ("--output x --dataset folder --data-root nowhere", "nowhere: no such folder"),
        ("--output x --dataset folder --data-root empty", "empty: no class folders"),
        ("--output x --dataset folder --data-root broken", "broken/cat/0.png"),
        ("--output x --dataset latents --data-root empty", "empty"),
        (
            "--output x --skip-broken",
            "--skip-broken: only 'folder' and 'shards' have files to skip",
        ),
        ("--output x --background black", "--background: only 'folder' has transparency"),
        ("--output x --background glass", "--background: expected a colour such as white"),
        ("--output x --preset S", "--dataset: 'digits' is 8 x 8, got 32"),
        ("--output x --image-size 9", "--image-size: expected a multiple of 2 for 2 stages, got 9"),
        ("--output x --num-classes 7", "--dataset: expected 7 classes for this model, got 10"),
        ("--output x --seconds 0", "--seconds: expected a number of seconds above 0, got '0'"),
        ("--output x --channels 0", "--channels: expected an integer of at least 1, got 0"),
        ("--output x --ar-layers -1", "--ar-layers: expected an integer of at least 0, got -1"),
        ("--output x --width 1.5", "--width: expected a whole number, got '1.5'"),
        ("--output x --model.width 34", "--model.width: expected a multiple of 4"),
        ("--output x --model.width=wide", "--model.width: expected a whole number, got 'wide'"),
        ("--output x --model.heads 5", "--model.heads: expected a divisor of width 32, got 5"),
        ("--output x --heads 5", "--heads: expected a divisor of width 32, got 5"),
        ("--output x --model.stage_sides 4,9", "--model.stage_sides: expected each side to be"),
        ("--output x --model.stage_sides 4,x", "--model.stage_sides: expected numbers with commas"),
        ("--output x --model.widht 8", "--model.widht 8; near it: --model.width"),
        ("--output x --bach-size 8", "--bach-size 8; near it: --batch-size"),
        ("--output-dir x --batch-size 0", "--batch-size: expected an integer of at least 1, got 0"),
        ("--output x --data birds", "--data: expected one of digits, mnist"),
        ("--resume x --config y --image-size 8", "--resume: --config does not go with it"),
        ("--output x --init-from nowhere", "checkpoint 'nowhere': no such folder"),
        ("--output x --vae nowhere", "VAE folder nowhere: holds no config.json"),
        ("--output tiny.json/x", "tiny.json: is not a folder"),
        ("--output /proc/self/x", "output folder /proc/self: not writable"),
        ("--resume x --preset S", "--resume: --config does not go with it"),
        ("", "--output: is needed for a new training"),
    ],
)
def test_bad_training_is_one_line(here, refused, options, message):
    (here / "empty").mkdir()
    (here / "broken" / "cat").mkdir(parents=True)
    (here / "broken" / "cat" / "0.png").write_bytes(b"no picture")
    assert message in refused(f"{NEW} {options}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--output x", "--preset: is needed for a new training"),
        ("--resume nowhere", "nowhere/state/state.safetensors: no such file"),
        ("--resume x --output y", "--resume: names the folder"),
        ("--config nowhere.json --output x", "nowhere.json: No such file or directory"),
        ("--config list.json --output x", "list.json holds no object"),
        ("--config text.json --output x", "text.json: not valid JSON"),
        (
            "--config other.json --output x",
            "--config: other.json: training config 'colour': no such field; known are model, ",
        ),
        (
            "--config near.json --output x",
            "--config: near.json: training config 'bach_size': no such field; near it: batch_size",
        ),
        (
            "--config size.json --output x --steps 3",
            "--config: size.json: 'batch_size': expected an integer of at least 1, got 0",
        ),
        (
            "--config model.json --output x",
            "--config: model.json: config 'widht': no such field; near it: width",
        ),
    ],
)
def test_bad_start_is_one_line(here, refused, line, message):
    (here / "list.json").write_text("[]")
    (here / "text.json").write_text("{")
    (here / "other.json").write_text('{"colour": 3, "model": {}}')
    (here / "near.json").write_text('{"bach_size": 3, "model": {}}')
    (here / "size.json").write_text('{"batch_size": 0, "model": {}}')
    (here / "model.json").write_text('{"model": {"widht": 3}}')
    assert message in refused(f"train {line}")


def test_a_training_is_not_overwritten(here, run, refused):
    run(f"{NEW} --output out")
    before = (here / "out" / "model.safetensors").read_bytes()
    assert "already holds a training" in refused(f"{NEW} --output out")
    assert (here / "out" / "model.safetensors").read_bytes() == before


class Images(torch.utils.data.Dataset):
    """As `ecar.data.ImageDataset`: three classes of random pictures."""

    name, split, shape, class_names, num_classes = "random", "train", (3, 16, 16), list("abc"), 3

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

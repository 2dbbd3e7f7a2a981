"""docs/imagenet.md: its commands run, one after another, at a small size; its figures hold."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from ecar.cli import main
from ecar.config import ECARConfig
from ecar.data import load_dataset
from ecar.info import count_training_multiply_adds
from ecar.training import TrainConfig
from ecar_kernels.costs import CHIPS
from tools.update_docs import ROOT

PAGE = (ROOT / "docs" / "imagenet.md").read_text("utf-8")
CONFIG = "examples/imagenet-256.json"
# What makes a command of the page small, after its own words.
SMALL = {
    "cache": "--image-size 64 --num-workers 0 --device cpu --no-progress",
    "train": (
        "--model.stage_sides 2,4,8 --model.width 16 --model.heads 2 --model.ar_layers 1 "
        "--model.flow_blocks 1 --model.num_classes 4 --steps 2 --batch-size 4 --save-every 1 "
        "--sample-every 2 --sample-rows 2 --sample-columns 2 --sample-steps 3 --validate-every 2 "
        "--no-compile --mixed-precision no --num-workers 0 --device cpu --no-progress"
    ),
    "resume": "--steps 3 --num-workers 0 --device cpu --no-progress",
    "sample": "--classes 0-3 --per-class 2 --steps 3 --device cpu --no-progress",
}


def commands():
    """The words after `ecar` of each command of the page that is ours."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    for words in map(shlex.split, lines):
        if "ecar" in words:
            yield words[words.index("ecar") + 1 :]


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """The working folder: tar files of two splits, names, a tiny VAE, the configuration."""
    webdataset = pytest.importorskip("webdataset", reason="needs ecar[shards]")
    from diffusers import AutoencoderKL

    for split, count in (("train", 2), ("val", 1)):
        folder = tmp_path / "imagenet" / split
        folder.mkdir(parents=True)
        for shard in range(count):
            with webdataset.TarWriter(str(folder / f"{shard:04d}.tar")) as writer:
                for row in range(6):
                    noise = np.random.default_rng().integers(0, 256, (70, 66, 3), dtype=np.uint8)
                    picture = Image.fromarray(noise)
                    sample = {"__key__": f"{row:06d}", "jpg": picture, "cls": row % 4}
                    writer.write(sample)
    (tmp_path / "imagenet" / "classnames.txt").write_text("tench\ngoldfish\nshark\nray\n")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4, norm_num_groups=2,
    ).save_pretrained(tmp_path / "sdxl-vae")  # fmt: skip
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_runs(imagenet):
    told = list(commands())
    assert [words[0] for words in told] == ["cache", "train", "train", "sample", "sample"]
    for words in told:
        kind = "resume" if "--resume" in words else words[0]
        assert main([*words, *SMALL[kind].split()]) == 0, words
    latents = load_dataset("latents", root=imagenet / "latents")
    assert len(latents) == 24 and latents.class_names == ("tench", "goldfish", "shark", "ray")
    assert (imagenet / "runs" / "imagenet" / "best" / "model.safetensors").is_file()
    assert (imagenet / "runs" / "imagenet" / "samples" / "step_0000002.png").is_file()
    assert len(list((imagenet / "images").iterdir())) == 8
    assert Image.open(imagenet / "imagenet.png").mode == "RGB"


def test_the_configuration_is_the_papers():
    values = json.loads((ROOT / CONFIG).read_text("utf-8"))
    config = TrainConfig.from_dict({**values, "output_dir": "runs"})
    assert config.model == ECARConfig.preset("S")
    assert (config.steps, config.batch_size) == (400_000, 256)
    assert (config.learning_rate, config.weight_decay) == (1e-4, 0.0)


def test_the_costs_are_those_of_the_formula():
    rows = re.findall(r"^\| E-CAR-([SBL]) \|(.*)\|$", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == ["S", "B", "L"]
    chips = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA B200")
    for name, row in rows:
        counted = count_training_multiply_adds(ECARConfig.preset(name))
        flops = 400_000 * 256 * 2 * counted
        hours = [
            flops / (8 * 0.3 * 2 * CHIPS[chip].rates.multiply_adds_per_second) / 3600
            for chip in chips
        ]
        figures = [f"{counted / 1e9:.0f} G", f"{flops:.1e}".replace("e+", "e")]
        assert [cell.strip() for cell in row.split("|")] == [*figures, *(f"{h:.1f}" for h in hours)]
    # Each model's sizes, as the page gives them.
    for name in "BL":
        sizes = ECARConfig.preset(name)
        said = [f"--model.{k} {getattr(sizes, k)}" for k in ("width", "heads", "ar_layers")]
        assert all(word in PAGE for word in [*said, f"--model.flow_blocks {sizes.flow_blocks}"])


def test_encoding_costs_what_it_says():
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        )  # fmt: skip
        vae.encode(torch.empty(1, 3, 256, 256))
    flops, images = counter.get_total_flops(), 2 * 1_281_167 + 50_000
    assert f"{flops / 2e9:.0f} G multiply-adds an image" in PAGE
    rate = CHIPS["NVIDIA H100 80GB HBM3"].rates.multiply_adds_per_second
    minutes = images * flops / (8 * 0.3 * rate) / 60  # a multiply-add in TF32 takes two's time
    assert f"{images / 1e6:.1f} M images" in PAGE and f"take {minutes:.0f} minutes on" in PAGE
    assert f"The latents take {images * 4 * 32 * 32 * 2 / 1e9:.0f} GB" in PAGE

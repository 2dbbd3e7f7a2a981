"""`ecar cache`: latents of a folder by a VAE, gone on with, shared, and what is refused."""

import io
import json
import re
import tarfile

import pytest
import torch
from PIL import Image

from ecar.codec import AutoencoderKLCodec
from ecar.data import load_dataset
from ecar.data.latents import shard_seed

RUN = "cache --dataset folder --data-root birds --image-size 16 --num-workers 0 --device cpu"


def save_vae(folder, seed):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    AutoencoderKLCodec(vae).save(folder)


@pytest.fixture
def here(tmp_path):
    """The working folder, which holds two VAEs and a folder of images with two splits."""
    save_vae(tmp_path / "vae", 0)
    save_vae(tmp_path / "other", 1)
    for split, count in (("train", 5), ("test", 2)):
        for name in ("robin", "wren"):
            folder = tmp_path / "birds" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(0, 256, (20, 18, 3), dtype=torch.uint8)
                Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    return tmp_path


def test_both_splits_are_encoded_and_read(here, run):
    line = f"{RUN} --vae vae --output latents --flip --dtype float16 --no-progress"
    code, output, errors = run(line)
    assert (code, errors) == (0, "")
    first, second = output.splitlines()
    assert first.startswith("latents/train: 20 latents 4 x 8 x 8, mean ")
    assert second.startswith("latents/test: 4 latents 4 x 8 x 8, mean ")
    codec = AutoencoderKLCodec.load(here / "vae")
    index = json.loads((here / "latents" / "train" / "index.json").read_text())
    assert index["codec"] == codec.describe()
    assert (index["codec"]["shift"], index["codec"]["scale"]) == ([0.25], [0.5])
    assert index["dtype"] == "F16"
    latents = load_dataset("latents", root=here / "latents")
    images = load_dataset("folder", root=here / "birds", image_size=16, flip=True)
    assert latents.class_names == ("robin", "wren")
    assert torch.equal(latents.labels, images.labels)
    with torch.random.fork_rng():
        torch.manual_seed(shard_seed(0, 0))
        expected = codec.encode(images.tensors()[0])
    assert torch.equal(latents.tensors()[0], expected.half().float())
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*.safetensors")}
    assert run(line) == (0, output, "")
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*.safetensors")} == before


def test_what_is_refused(here, run, refused):
    (here / "notes.txt").write_text("no folder")
    (here / "empty").mkdir()
    for options, message in [
        ("--vae nowhere", "VAE folder nowhere: holds no config.json"),
        ("--vae vae --image-size 15", "--image-size: expected sides that are multiples of 2"),
        ("--vae vae --dataset digits --image-size 8", "--vae: 'digits' has 1, got 3"),
        ("--vae vae --data-root nowhere", "nowhere: no such folder"),
        ("--vae vae --data-root empty", "empty: no class folders"),
        ("--vae vae --shard-size 0", "--shard-size: expected a positive whole number, got '0'"),
        ("--vae vae --output notes.txt/x", "notes.txt: is not a folder"),
    ]:
        assert message in refused(f"{RUN} --no-progress --output new {options}")
    assert run(f"{RUN} --vae vae --output latents --no-progress")[0] == 0
    for options, message in [
        ("--vae other", "index.json: of another cache: 'codec' is {'kind': 'autoencoder_kl', "),
        ("--vae vae --flip", "'count' is 10 there, 20 here; give another folder, or remove it"),
        ("--vae vae --data-root birds/test", "index.json: of another cache: 'count' is 10 there"),
    ]:
        assert message in refused(f"{RUN} --no-progress --output latents {options}")


def test_a_folder_may_have_the_name_of_its_kind(here, run):
    """`ecar cache --output latents`, then `ecar train --dataset latents`."""
    assert run(f"{RUN} --vae vae --output latents --no-progress")[0] == 0
    line = "train --preset digits --dataset latents --steps 1 --batch-size 2 --num-workers 0 "
    line += "--device cpu --sample-every 0 --no-progress --output new"
    assert run(line)[0] == 0
    (here / "latents").rename(here / "moved")
    (here / "new").rename(here / "newer")
    assert "--data-root: the data set 'latents' needs a folder" in run(line)[2]


def test_training_refuses_another_vae(here, run):
    assert run(f"{RUN} --vae vae --output latents --no-progress")[0] == 0
    line = (
        "train --preset digits --dataset latents --data-root latents --steps 1 --batch-size 2 "
        "--num-workers 0 --device cpu --sample-every 0 --no-progress --validate-every 1 --output"
    )
    code, _, errors = run(f"{line} wrong --vae other")
    assert code == 2
    assert "--vae: other is not what encoded the latents in latents" in errors
    assert run(f"{line} right --vae vae")[0] == 0
    assert (here / "right" / "validation.csv").is_file()


def test_processes_of_torchrun_share_the_shards(here, run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = f"{RUN} --vae vae --output latents --shard-size 3 --no-progress"
    monkeypatch.setenv("RANK", "0")
    code, output, _ = run(line)
    assert code == 0
    assert output.startswith("latents/train: 10 latents 4 x 8 x 8; other processes are still")
    found = sorted(path.name for path in (here / "latents" / "train").glob("*.safetensors"))
    assert found == ["latents-00000.safetensors", "latents-00002.safetensors"]
    monkeypatch.setenv("RANK", "1")
    assert run(line) == (0, "", "")
    assert len(load_dataset("latents", root=here / "latents")) == 10
    assert "mean" in json.loads((here / "latents" / "train" / "index.json").read_text())


def write_tar(path, files, broken, each):
    """Samples of these images, of which one is cut short; as many of each class."""
    with tarfile.open(path, "w") as archive:
        for number, file in enumerate(files):
            data = file.read_bytes()[: 50 if number == broken else None]
            for suffix, content in (("png", data), ("cls", str(number // each).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("command", ["cache", "train"])
def test_a_broken_image_is_named_by_whichever_process_reads_it(here, run, command, workers):
    """One that no look at the data set beforehand sees."""
    pytest.importorskip("webdataset", reason="needs ecar[shards]")
    files = sorted((here / "birds" / "train").glob("*/*.png")) * 10
    looked_at = set(torch.linspace(0, 99, 64).round().int().tolist())
    write_tar(here / "train.tar", files, min(set(range(1, 99)) - looked_at), 50)
    line = {
        "cache": "cache --vae vae",
        "train": "train --preset digits --batch-size 50 --steps 3 --sample-every 0",
    }[command]
    code, output, errors = run(
        f"{line} --dataset train.tar --image-size 16 --device cpu --num-workers {workers} "
        "--no-progress --output new"
    )
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert re.match(r"ecar: error: train.tar, byte [\d,]+: not a readable image \(", errors)


def test_broken_images_in_tar_files_are_left_out(here, run):
    pytest.importorskip("webdataset", reason="needs ecar[shards]")
    write_tar(here / "train.tar", sorted((here / "birds" / "train").glob("*/*.png")), 3, 5)
    line = "cache --dataset train.tar --image-size 16 --vae vae --device cpu --num-workers 0 "
    line += "--no-progress --output latents"
    code, _, errors = run(line)
    assert code == 2 and "train.tar, byte " in errors and "not a readable image" in errors
    with pytest.warns(UserWarning, match="1 of 10 images are left out"):
        code, output, _ = run(f"{line} --skip-broken")
    assert code == 0 and output.startswith("latents/train: 9 latents 4 x 8 x 8, mean ")


def test_ctrl_c_says_how_to_go_on(here, run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    line = f"{RUN} --vae vae --output latents --no-progress"
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKLCodec, "encode", interrupt)
        code, output, errors = run(line)
    assert (code, output) == (130, "")
    goes_on, interrupted = errors.splitlines()
    assert goes_on == "ecar: shards in latents are kept; the same command goes on"
    assert interrupted == "ecar: interrupted"
    assert run(line)[0] == 0

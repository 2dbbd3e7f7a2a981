"""What an installed ecar must do with its extras: python -I tests/smoke_extras.py.

Needs ecar[train,eval,vae,shards,gallery,onnx] and peft, nothing of the checkout but this file and
examples/draw_onnx.py. In a folder of its own a user caches latents by a VAE, trains on images, tar
files and the latents, draws, measures, exports, accelerates a model of diffusers, and opens the
gallery.
"""

import copy
import io
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ecar
import ecar_kernels as ek
from ecar_kernels.testing import verdicts

ECAR = str(Path(sys.executable).with_name("ecar"))
DRAW_ONNX = Path(__file__).parent.parent / "examples" / "draw_onnx.py"
TRAIN = "train --preset digits --batch-size 4 --num-workers 0 --steps 2 --no-progress --output"


def command(line: str, folder: Path) -> str:
    done = subprocess.run([ECAR, *line.split()], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, f"ecar {line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def images(folder: Path) -> None:
    """Ten of two classes and as many held out, in class folders; the first also in a tar file."""
    with tarfile.open(folder / "train.tar", "w") as archive:
        for number in range(20):
            split, name = ("train", "test")[number // 10], ("robin", "wren")[number % 2]
            path = folder / "birds" / split / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(noise).save(path)
            if split == "train":
                archive.add(path, f"{number}.png")
                label = tarfile.TarInfo(f"{number}.cls")
                label.size = 1
                archive.addfile(label, io.BytesIO(str(number % 2).encode()))


def latents(folder: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")
    cache = "cache --dataset birds --image-size 16 --vae vae --output latents --num-workers 0"
    first = command(cache, folder)
    assert "10 latents 4 x 8 x 8" in first and command(cache, folder) == first


def training(folder: Path) -> None:
    command(f"{TRAIN} digits --dataset digits", folder)
    command(f"{TRAIN} tar --dataset train.tar --image-size 16", folder)
    command(f"{TRAIN} latent --dataset latents/ --vae vae", folder)
    command("train --resume latent --steps 3 --no-progress", folder)
    command("sample --checkpoint latent --classes 0,wren --output robin/and.png", folder)
    evaluate = "evaluate --checkpoint tar --dataset birds --samples 8 --classifier train"
    command(f"{evaluate} --output report.json", folder)
    assert "metrics" in json.loads((folder / "report.json").read_text())


def export(folder: Path) -> None:
    """ONNX by ONNX Runtime, in a process without torch; AOTInductor where there is a compiler."""
    command("export --checkpoint digits --format onnx --output onnx", folder)
    example = [sys.executable, "-I", DRAW_ONNX, "onnx", "--label", "3", "--seed", "7"]
    subprocess.run(example, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    pipe = ecar.ECARPipeline.from_pretrained(folder / "digits")
    latent = pipe(3, seeds=7, output_type="latent", progress=False).images[0].numpy()
    assert np.abs(np.load(folder / "latent.npy") - latent).max() < 1e-4
    if shutil.which("g++") is not None:
        ecar.ECAR(ecar.ECARConfig(
            stage_sides=(2,), channels=1, patch_size=1, width=16, heads=2, ar_layers=1,
            flow_blocks=1, num_classes=3,
        )).save_pretrained(folder / "small")  # fmt: skip
        command("export --checkpoint small --format aoti --output aoti", folder)


def integration() -> None:
    """A model of diffusers: plain, accelerated, an adapter of peft on top, and back."""
    from diffusers import DiTTransformer2DModel
    from peft import LoraConfig, inject_adapter_in_model

    plain = DiTTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=32, sample_size=8
    ).eval()
    fast, x, labels = copy.deepcopy(plain), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    assert [row.left for row in ek.accelerate(fast)] == [()] * 2

    def run(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with torch.no_grad():
            return model(x.to(dtype), torch.tensor([5, 5]), labels).sample

    for adapted in (False, True):
        before = run(plain)
        if adapted:
            for model in (plain, fast):
                torch.manual_seed(0)
                config = LoraConfig(target_modules=["to_q"], init_lora_weights=False)
                inject_adapter_in_model(config, model)
        exact = run(copy.deepcopy(plain).double(), torch.float64)
        for verdict in verdicts([run(fast)], [run(plain)], [exact]):
            assert verdict.ok, verdict
        assert adapted == (not torch.equal(run(plain), before))
    assert torch.equal(run(ek.restore(fast)), run(plain))


def gallery(folder: Path) -> None:
    from gradio_client import Client

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = subprocess.Popen(
        [ECAR, "gallery", "--checkpoint", "digits", "--port", port],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        address = process.stdout.readline().strip()
        assert address, process.communicate()[1]
        path = Client(address, verbose=False).predict([3, 5], 7, 6, 2.0, api_name="/draw")
        assert Image.open(path).width > 2 * 128
    finally:
        process.kill()


def main() -> None:
    for package in (ecar, ek):
        assert "site-packages" in package.__file__, f"not installed: {package.__file__}"
    integration()
    with tempfile.TemporaryDirectory(prefix="ecar-extras-") as name:
        folder = Path(name)
        for part in (images, latents, training, export, gallery):
            part(folder)
    print(f"ecar {ek.__version__} with its extras works with torch {torch.__version__}")


if __name__ == "__main__":
    main()

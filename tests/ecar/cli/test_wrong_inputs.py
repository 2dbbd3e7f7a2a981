"""What every command says of wrong inputs: one line, exit code 2, no file written."""

import contextlib
import ctypes
import importlib
import json
import os
import shutil

import pytest

from ecar.cli import COMMANDS

from ..conftest import full_disk

SAMPLE = "sample --checkpoint model --steps 2 --sheet 1x1 --no-progress"
TRAIN = "train --config t.json --output new --no-progress"
CACHE = "cache --dataset birds --image-size 16 --vae vae --output new --num-workers 0 --no-progress"
EVALUATE = "evaluate --checkpoint model --dataset digits --samples 8 --steps 2 --no-progress"
STEPS = "steps --checkpoint model --images 2 --calls 8 --no-progress"
INFO = "info --checkpoint model"
EXPORT = "export --checkpoint model --format torch --output new"
GALLERY = "gallery --checkpoint model"
TUNE = "tune --preset S"

# Of each command, with "cut.safetensors", "notes.txt" (text) and "empty" (a folder) at hand: what
# is wrong, and what is said.
WRONG = {
    SAMPLE: [
        ("--checkpoint nowhere", "checkpoint 'nowhere': no such folder"),
        ("--checkpoint notes.txt", "checkpoint 'notes.txt': not a folder"),
        ("--checkpoint empty", "checkpoint 'empty': no file config.json"),
        ("--checkpoint cut", "cut/model.safetensors: not a safetensors file, or cut short"),
        ("--output notes.txt/x.png", "notes.txt: is not a folder"),
        ("--output x.txt", "output file x.txt: expected a picture's suffix"),
        ("--steps many", "--steps: expected a positive whole number"),
        ("--seed x", "--seed: invalid int value: 'x'"),
        (f"--seed {2**63}", f"--seed: expected int64 numbers, got {2**63}"),
        ("--guidance x", "--guidance: invalid float value: 'x'"),
        ("--classes tre", "--classes: no class is named 'tre'; near it: three"),
        ("--device gpu", "--device: cannot use 'gpu' here"),
        ("--clases 3", "unrecognized arguments: --clases 3; near it: --classes"),
    ],
    TRAIN: [
        ("--config nowhere.json", "nowhere.json: No such file or directory"),
        ("--config empty", "empty: Is a directory"),
        ("--config notes.txt", "notes.txt: not valid JSON"),
        ("--config cut.safetensors", "cut.safetensors: not valid JSON"),
        ("--dataset nowhere/", "nowhere/: no such folder"),
        ("--dataset empty", "empty: no class folders and no images"),
        ("--dataset latents --data-root notes.txt", "notes.txt: no such folder"),
        ("--vae empty", "VAE folder empty: holds no config.json"),
        ("--vae cutvae", "VAE folder cutvae: "),
        ("--init-from cut", "cut/model.safetensors: not a safetensors file, or cut short"),
        ("--steps x", "--steps: expected a whole number, got 'x'"),
        ("--model.width x", "--model.width: expected a whole number, got 'x'"),
        (f"--seed {2**63}", "--seed: expected an integer below 2^63"),
        ("--output notes.txt", "output folder notes.txt: is not a folder"),
    ],
    CACHE: [
        ("--dataset nowhere/", "nowhere/: no such folder"),
        ("--dataset empty", "empty: no class folders and no images"),
        ("--dataset notes.txt", "--dataset: expected one of digits, mnist, emoji, folder"),
        ("--vae nowhere", "VAE folder nowhere: holds no config.json"),
        ("--vae notes.txt", "VAE folder notes.txt: holds no config.json"),
        ("--vae cutvae", "VAE folder cutvae: "),
        ("--output notes.txt", "output folder notes.txt: is not a folder"),
        ("--image-size x", "--image-size: expected a positive whole number, got 'x'"),
        ("--image-sise 8", "near it: --image-size"),
        ("--seed -1", "--seed: expected a whole number of at least 0, got '-1'"),
    ],
    EVALUATE: [
        ("--checkpoint nowhere", "checkpoint 'nowhere': no such folder"),
        ("--checkpoint cut", "cut/model.safetensors: not a safetensors file, or cut short"),
        ("--dataset nowhere/", "nowhere/: no such folder"),
        ("--classifier nowhere", "nowhere: no such file"),
        ("--classifier empty", "empty: no such file"),
        ("--classifier cut.safetensors", "cut.safetensors: not a safetensors file, or cut short"),
        ("--inception nowhere", "nowhere: no such file"),
        ("--output empty", "empty: is a folder"),
        ("--output notes.txt/x", "notes.txt: is not a folder"),
        ("--npz x.png", "--npz: expected a name that ends in .npz"),
        ("--samples x", "--samples: expected a positive whole number, got 'x'"),
        (f"--seed {2**63 - 2}", f"--seed: expected int64 numbers, got {2**63 + 5}"),
    ],
    STEPS: [
        ("--checkpoint nowhere", "checkpoint 'nowhere': no such folder"),
        ("--checkpoint cut", "cut/model.safetensors: not a safetensors file, or cut short"),
        ("--output empty", "empty: is a folder"),
        ("--picture x.png", "--picture: expected a name that ends in .svg"),
        ("--calls x", "--calls: expected a positive whole number, got 'x'"),
        (f"--seed {2**63 - 1}", f"--seed: expected int64 numbers, got {2**63}"),
    ],
    INFO: [
        ("--checkpoint nowhere", "checkpoint 'nowhere': no such folder"),
        ("--checkpoint empty", "checkpoint 'empty': no file config.json"),
        ("--config t.json", "not allowed with argument"),
        ("--steps x", "--steps: expected a positive whole number"),
        ("--jsn", "near it: --json"),
    ],
    "info": [
        ("--config nowhere.json", "nowhere.json: No such file or directory"),
        ("--config empty", "empty: Is a directory"),
        ("--config notes.txt", "notes.txt: not valid JSON"),
        ("--preset M", "--preset: invalid choice: 'M'"),
    ],
    EXPORT: [
        ("--checkpoint nowhere", "checkpoint 'nowhere': no such folder"),
        ("--checkpoint cut", "cut/model.safetensors: not a safetensors file, or cut short"),
        ("--format pickle", "--format: invalid choice: 'pickle'"),
        ("--output notes.txt", "output folder notes.txt: is not a folder"),
        ("--steps x", "--steps: expected a positive whole number"),
    ],
    GALLERY: [
        ("--checkpoint nowhere", "checkpoint 'nowhere': no such folder"),
        ("--checkpoint cut", "cut/model.safetensors: not a safetensors file, or cut short"),
        ("--port x", "--port: expected a positive whole number, got 'x'"),
        ("--port 65536", "--port: expected a port from 1 to 65535, got '65536'"),
        ("--device gpu", "--device: cannot use 'gpu' here"),
    ],
    TUNE: [
        ("--batch x", "--batch: expected a positive whole number, got 'x'"),
        ("--rows 4", "--width and --rows: expected both or neither"),
        ("--preset M", "--preset: invalid choice: 'M'"),
    ],
}


def prepare(folder):
    """Add to a folder with the checkpoint "model" what the lines name."""
    from diffusers import AutoencoderKL
    from PIL import Image

    config = json.loads((folder / "model" / "config.json").read_text())
    values = {"model": config, "steps": 1, "batch_size": 2, "sample_every": 0, "device": "cpu"}
    (folder / "t.json").write_text(json.dumps({**values, "num_workers": 0}))
    (folder / "notes.txt").write_text("words")
    (folder / "empty").mkdir()
    (folder / "birds" / "robin").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(folder / "birds" / "robin" / "1.png")
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(folder / "vae")
    for whole, cut in (("model", "cut"), ("vae", "cutvae")):
        shutil.copytree(folder / whole, folder / cut)
        (file,) = (folder / cut).glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
    shutil.copy(folder / "cut" / "model.safetensors", folder / "cut.safetensors")


@pytest.fixture
def here(folder):
    prepare(folder)
    return folder


@pytest.mark.parametrize("line", WRONG)
def test_one_line_says_what_is_wrong(here, refused, line):
    for options, message in WRONG[line]:
        assert message in refused(f"{line} {options}"), options


def test_every_command_is_tried():
    assert {line.split()[0] for line in WRONG} == set(COMMANDS)


@pytest.mark.parametrize(
    ("line", "file"),
    [
        (f"{SAMPLE} --output x.png", "x.png"),
        (f"{SAMPLE} --output new", "new/class0-seed000000.png"),
        (f"{EVALUATE} --samples 4 --output r.json", "r.json"),
        (f"{EVALUATE} --samples 4 --npz s.npz", "s.npz"),
        (f"{STEPS} --output r.json", "r.json"),
        (CACHE, "new/train/index.json"),
        (TRAIN, "new/pipeline.json"),
        ("train --resume old --steps 2 --no-progress", "old/"),
    ],
)
def test_a_full_disk_is_one_line(here, run, line, file):
    """And what lies there is as it was."""
    if "--resume" in line:
        assert run("train --config t.json --output old --no-progress")[0] == 0
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    with full_disk():
        code, _, errors = run(line)
    assert code == 2
    assert errors.startswith("ecar: error: ") and errors.count("\n") == 1
    assert file in errors and "File too large" in errors
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


@contextlib.contextmanager
def permissions_bind():
    """Root too: this thread is without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    kept = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, kept) == 0, os.strerror(ctypes.get_errno())
    bound = type(kept)(kept[0] & ~0b110, *kept[1:])
    assert libc.capset(header, bound) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(header, kept) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.parametrize(
    ("line", "locked", "message"),
    [
        (SAMPLE, "model/model.safetensors", "model.safetensors: Permission denied"),
        (SAMPLE, "model/config.json", "model/config.json: Permission denied"),
        (f"{SAMPLE} --output empty/x.png", "empty", "output folder empty: not writable"),
        (TRAIN, "t.json", "t.json: Permission denied"),
        ("train --config t.json --output empty/x", "empty", "empty: not writable"),
        (CACHE, "vae/config.json", "VAE folder vae: "),
        (CACHE, "birds/robin/1.png", "1.png: not a readable image (Permission denied)"),
        (
            f"{EVALUATE} --classifier cut.safetensors",
            "cut.safetensors",
            "safetensors: Permission denied",
        ),
        (f"{STEPS} --output empty/x.json", "empty", "output folder empty: not writable"),
        ("info --config t.json", "t.json", "t.json: Permission denied"),
    ],
)
def test_no_permission_is_one_line(here, run, line, locked, message):
    mode = (here / locked).stat().st_mode
    os.chmod(here / locked, 0o555 if (here / locked).is_dir() else 0)
    with permissions_bind():
        code, output, errors = run(line)
    os.chmod(here / locked, mode)
    assert (code, output) == (2, ""), errors
    assert errors.startswith("ecar: error: ") and errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_is_130(run, monkeypatch, command):
    def interrupt(arguments):
        raise KeyboardInterrupt

    line = next(line for line in WRONG if line.split()[0] == command and line != "info")
    module = importlib.import_module(f"ecar.cli.{command}")
    monkeypatch.setattr(module, "run", interrupt)
    assert run(line) == (130, "", "ecar: interrupted\n")

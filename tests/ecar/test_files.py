"""Every file that the product writes is whole or as it was, whatever happens; what can't be written
is an OSError of one line that names it."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ecar import ECARPipeline
from ecar.checkpoint import write_settings
from ecar.codec import AutoencoderKLCodec
from ecar.data import InMemoryDataset, cache_latents
from ecar.evaluation import save_npz
from ecar.evaluation.classifier import Classifier, ClassifierConfig
from ecar.files import append, atomic_folder, atomic_path, check_target, write_json, write_tensors
from ecar.images import save_image
from ecar.training import TrainConfig
from ecar.training.log import Log, _Table
from ecar.training.sheet import write_sheet
from ecar.training.state import write_state
from ecar_kernels import tuning

from .conftest import full_disk, tiny_config, tiny_model

MODEL = tiny_model()
TRAIN = TrainConfig(
    model=tiny_config(), output_dir="x", sample_rows=1, sample_columns=1, sample_steps=2
)
CLASSIFIER = Classifier(ClassifierConfig(image_size=8, widths=(4, 4), features=4))
SCRATCH = ".ecar-tmp"


def vae():
    return AutoencoderKLCodec(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))


def encode(folder):
    data = InMemoryDataset(
        "x", "train", torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4), "abcd"
    )
    codec = type("Codec", (), {"encode": lambda self, images: images})()
    (folder / "index.json").unlink(missing_ok=True)  # an unfinished cache is written again
    cache_latents(data, codec, folder, progress=False)


def log_row(folder):
    table = object.__new__(_Table)  # without the header that a new one writes
    table.path, table.columns = folder / "log.csv", ["step", "loss"]
    table.write({"step": 3, "loss": 0.5})


# Of each writer: the files it writes below the folder that it is given, the last one first made.
WRITERS = {
    "model": (lambda f: MODEL.save_pretrained(f), ["config.json", "model.safetensors"]),
    "pipeline": (lambda f: ECARPipeline(MODEL).save_pretrained(f),
                 ["config.json", "model.safetensors", "pipeline.json"]),
    "pipeline.json": (lambda f: write_settings(f, None, None, {}), ["pipeline.json"]),
    "vae": (lambda f: vae().save(f),
            ["config.json", "diffusion_pytorch_model.safetensors"]),
    "model config": (lambda f: MODEL.config.to_json(f / "c.json"), ["c.json"]),
    "train config": (lambda f: TRAIN.to_json(f / "train.json"), ["train.json"]),
    "report": (lambda f: write_json(f / "evaluation.json", {"a": 1}), ["evaluation.json"]),
    "tensors": (lambda f: write_tensors(f / "t.safetensors", {"a": torch.ones(9)}),
                ["t.safetensors"]),
    "state": (lambda f: write_state(f / "state.safetensors", {"a": torch.ones(9)}, TRAIN, {}),
              ["state.safetensors"]),
    "classifier": (lambda f: CLASSIFIER.save(f / "c.safetensors"), ["c.safetensors"]),
    "latents": (encode, ["latents-00000.safetensors"]),
    "npz": (lambda f: save_npz(f / "s.npz", np.zeros((2, 8, 8, 3), np.uint8), None), ["s.npz"]),
    "image": (lambda f: save_image(Image.new("RGB", (9, 9)), f / "x.png"), ["x.png"]),
    "jpeg": (lambda f: save_image(Image.new("RGB", (9, 9)), f / "x.jpg"), ["x.jpg"]),
    "sheet": (lambda f: write_sheet(MODEL, TRAIN, f / "sheet.png", None), ["sheet.png"]),
    "log": (lambda f: Log(f, ["step", "loss"], kind="csv", step=0), ["log.csv"]),
    "log's row": (log_row, ["log.csv"]),
    "tuned settings": (lambda f: tuning.write(f / "gpu.json", "GPU", []), ["gpu.json"]),
}  # fmt: skip
OLD = b"the file from before"


@pytest.fixture(params=WRITERS)
def writer(request):
    return WRITERS[request.param]


@pytest.fixture
def folder(tmp_path, writer):
    """A folder that holds all files of the writer from before."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in writer[1]:
        (folder / name).write_bytes(OLD)
    return folder


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(write, folder, names, kind=OSError):
    """It fails by one line that names one of the files, and nothing is changed."""
    before = contents(folder)
    with pytest.raises(kind) as caught:
        write(folder)
    message = str(caught.value)
    assert any(str(folder / name) in message for name in names), message
    assert "\n" not in message and SCRATCH not in message
    assert contents(folder) == before
    return caught.value


def test_written(writer, folder):
    write, names = writer
    write(folder)
    assert {name for name, data in contents(folder).items() if data != OLD} >= set(names)
    assert not list(folder.rglob(f"{SCRATCH}*"))
    umask = os.umask(0)
    os.umask(umask)
    for name in names:
        assert (folder / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_full_disk(writer, folder):
    write, names = writer
    if names == ["latents-00000.safetensors"]:
        names = [*names, "index.json"]
    with full_disk():
        error = refused(write, folder, names)
    if "tuning" not in str(write.__code__.co_names):
        assert error.errno == errno.EFBIG
    assert "File too large" in str(error)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_is_full_when_it_is_flushed(writer, folder, code, monkeypatch):
    """As network file systems and quotas say it; only the append has no flush of its own."""
    write, names = writer
    if write is log_row or names == ["gpu.json"]:
        return
    if names == ["latents-00000.safetensors"]:
        names = [*names, "index.json"]
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(
        OSError(code, os.strerror(code))))  # fmt: skip
    error = refused(write, folder, names)
    assert error.errno == code and os.strerror(code) in str(error)


def test_an_interrupted_write(writer, folder, monkeypatch):
    """Ctrl-C before the first new file takes its place."""
    write = writer[0]
    if write is log_row:
        return  # appended by one call of the system
    before = contents(folder)

    def interrupt(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(folder)
    assert contents(folder) == {k: v for k, v in before.items() if k != "index.json"}


def test_a_file_marked_read_only(writer, folder):
    write, names = writer
    if write is log_row and os.getuid() == 0:
        return  # appending, not replacing: root may
    (folder / names[-1]).chmod(0o444)
    refused(write, folder, [names[-1]], PermissionError)


def test_a_folder_in_place_of_the_file(writer, folder):
    write, names = writer
    (folder / names[-1]).unlink()
    (folder / names[-1]).mkdir()
    refused(write, folder, [names[-1]], IsADirectoryError)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_written(writer, folder, code, monkeypatch):
    write, names = writer
    if write is log_row or names == ["gpu.json"]:
        return  # no file is made; its own way
    if names == ["latents-00000.safetensors"]:
        names = [*names, ""]  # the folder is tried before images are encoded

    def fail(path, *options, **more):
        if Path(path).name.startswith((SCRATCH, ".ecar-")):
            raise OSError(code, os.strerror(code), str(path))
        return make(path, *options, **more)

    make = os.mkdir
    monkeypatch.setattr(os, "mkdir", fail)
    error = refused(write, folder, [*names, ""])
    assert os.strerror(code) in str(error)
    assert type(error) is type(OSError(code, ""))


def test_a_target_that_is_no_file(tmp_path):
    for target in ("/dev/full", "/dev/null"):
        with pytest.raises(OSError, match=f"{target}: is not a regular file"):
            write_json(target, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"file/x\.json: cannot be written"):
        write_json(tmp_path / "file" / "x.json", {})
    assert check_target(tmp_path / "new") == tmp_path / "new"


def test_folders_are_made_and_taken_back_where_the_write_fails(tmp_path):
    write_json(tmp_path / "a" / "b" / "x.json", {})
    assert (tmp_path / "a" / "b" / "x.json").is_file()
    with pytest.raises(TypeError):
        write_json(tmp_path / "c" / "x.json", object())
    assert not (tmp_path / "c").exists()


KILLED = """
    import os, signal, sys
    from ecar.files import atomic_folder, write_json
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
    for folder in sys.argv[1:]:
        if os.fork() == 0:
            if folder.endswith("file"):
                write_json(folder + "/x.json", [1] * 10000)
            with atomic_folder(folder) as scratch:
                (scratch / "x.json").write_text("new")
        print(os.wait()[1])
"""


def test_a_killed_process_leaves_the_old_file_and_the_next_one_tidies_up(tmp_path):
    folders = [tmp_path / "file", tmp_path / "folder"]
    for folder in folders:
        folder.mkdir()
        (folder / "x.json").write_bytes(OLD)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), *map(str, folders)], check=True,
        env={**os.environ, "PYTHONPATH": str(Path(sys.modules["ecar"].__file__).parents[1])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * 2
    for folder in folders:
        assert (folder / "x.json").read_bytes() == OLD
        assert len(list(folder.iterdir())) == 2
        write_json(folder / "y.json", {})
        assert sorted(path.name for path in folder.iterdir()) == ["x.json", "y.json"]


def test_writers_side_by_side(tmp_path):
    """Of one folder, one file even: each has a scratch folder of its own."""
    with atomic_path(tmp_path / "x") as first, atomic_path(tmp_path / "x") as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "first"


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", none)
    with atomic_path(tmp_path / "x") as first, atomic_path(tmp_path / "y") as second:
        first.write_text("1")
        second.write_text("2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_errors_of_other_files_keep_their_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"), atomic_path(tmp_path / "x"):
        (tmp_path / "absent.txt").read_text()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "new"):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_a_row_cut_short_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    path.write_text("step\n1\n")
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:3]))
    with pytest.raises(OSError, match=r"log\.csv: cannot be written \(only 3 of 12 bytes"):
        append(path, "2,0.12345,6\n")
    assert path.read_text() == "step\n1\n"

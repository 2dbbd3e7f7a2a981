"""The command line as a process: exit codes, Ctrl-C, a reader that goes away, missing extras."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from ecar.cli import COMMANDS, SPIN_VARIABLES

TIMEOUT = 120


def command(*words):
    return [sys.executable, "-m", "ecar", *words]


@pytest.fixture
def start(tmp_path):
    """Start a command in the working folder."""
    root = os.path.dirname(os.path.dirname(sys.modules["ecar"].__file__))
    ours = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    begun = []

    def start(arguments, environment=os.environ):
        process = subprocess.Popen(
            arguments,
            cwd=tmp_path,
            env={**environment, **ours},
            text=True,
            start_new_session=True,
            # Where the tests themselves run in the background, Ctrl-C is ignored, and that is
            # inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def test_samples(folder, start):
    process = start(command("sample", "--checkpoint", "model", "--output", "x.png"))
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    assert output.startswith("x.png\n")
    assert (folder / "x.png").exists()


def test_torchrun_draws_each_image_once(folder, start):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["sample", "--checkpoint", "model", "--per-class", "2", "--output", "out"]
    process = start([*launcher, "--nproc-per-node", "2", "-m", "ecar", *words])
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    assert "(10 images in" in output and "by one of 2 processes" in output
    assert len(list((folder / "out").iterdir())) == 20


@pytest.mark.parametrize(
    ("before", "code", "spins"),
    [
        ({}, "", "3000"),
        ({"GOMP_SPINCOUNT": "77"}, "", "77"),
        ({"OMP_WAIT_POLICY": "active"}, "", None),
        ({}, "import torch; ", None),
    ],
)
def test_threads_spin_briefly_unless_the_user_says_how_they_wait(
    folder, start, before, code, spins
):
    """As OpenMP itself reports it when torch is imported."""
    code += "import ecar.cli; ecar.cli.main(['sample', '--checkpoint', 'nowhere'])"
    kept = {name: os.environ[name] for name in os.environ if name not in SPIN_VARIABLES}
    environment = {**kept, **before, "OMP_DISPLAY_ENV": "VERBOSE"}
    process = start([sys.executable, "-c", code], environment)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert "no such folder" in errors
    found = re.search("GOMP_SPINCOUNT = '([0-9]+)'", errors)
    assert found is not None, "no GNU OpenMP"
    if spins is None:
        assert int(found[1]) >= 300_000
    else:
        assert found[1] == spins


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sample", "--checkpoint", "nowhere"), "checkpoint 'nowhere': no such folder"),
        (("train", "--preset", "digits", "--output", "/proc/self/x"), "/proc/self: not writable"),
        ((), "a command is needed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(folder, start, words, message):
    before = sorted(folder.rglob("*"))
    process = start(command(*words))
    output, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, output) == (2, "")
    assert errors.startswith("ecar: error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert sorted(folder.rglob("*")) == before


def test_broken_images_are_skipped_and_counted(folder, start):
    """And refused without the flag, all of them in one line."""
    for name in "0123456789":
        (folder / "data" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "data" / name / "1.png")
    (folder / "data" / "3" / "2.png").write_bytes(b"")
    (folder / "data" / "4" / "2.jpg").write_bytes(b"no picture")
    values = {"model": json.loads((folder / "model" / "config.json").read_text()), "steps": 1,
              "batch_size": 2, "sample_every": 0, "device": "cpu", "num_workers": 0,
              "dataset": "folder", "data_root": "data"}  # fmt: skip
    (folder / "t.json").write_text(json.dumps(values))
    words = command("train", "--config", "t.json", "--output", "out", "--no-progress")
    process, skipping = start(words), start([*words[:-2], "new", "--no-progress", "--skip-broken"])
    _, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, errors.count("\n")) == (2, 1)
    assert errors == (
        "ecar: error: data: 2 of 12 files are not readable images: 3/2.png (the file is empty); "
        "4/2.jpg (of no known format); --skip-broken goes on without them\n"
    )
    _, errors = skipping.communicate(timeout=TIMEOUT)
    assert (skipping.returncode, errors.count("\n")) == (0, 1)
    assert errors.startswith("ecar: warning: data: 2 of 12 files are left out")
    assert json.loads((folder / "new" / "train.json").read_text())["skip_broken"] is True


EXTRAS = (
    "accelerate",
    "braceexpand",
    "diffusers",
    "gradio",
    "matplotlib",
    "scipy",
    "sklearn",
    "tensorboard",
    "torchmetrics",
    "webdataset",
)


def without_extras(line):
    """The command line in an installation that has none of them."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))\n"
        f"from ecar.cli import main; sys.exit(main({line.split()!r}))"
    )
    return [sys.executable, "-c", program]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_extra(start, command):
    process = start(without_extras(f"{command} --help"))
    output, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, errors) == (0, "")
    assert output.startswith(f"usage: ecar {command} ")


def test_missing_accelerate_names_the_extra(folder, start):
    process = start(without_extras("train --preset mnist --dataset mnist --output run"))
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2
    assert errors.count("\n") == 1
    assert "pip install 'ecar[train]'" in errors


def test_an_internal_bug_shows_its_traceback(start):
    program = (
        "import sys, ecar.cli.info as info; from ecar.cli import main\n"
        "def fail(*_): raise RuntimeError('a bug')\n"
        "info.count_parameters = fail\n"
        "sys.exit(main(['info', '--preset', 'digits']))"
    )
    process = start([sys.executable, "-c", program])
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert "Traceback" in errors
    assert errors.endswith("RuntimeError: a bug\n")


def wait_for(process, text):
    """Read stderr until it is there: the command is at work."""
    shown = ""
    deadline = time.monotonic() + TIMEOUT
    while text not in shown:
        assert time.monotonic() < deadline
        character = process.stderr.read(1)
        assert character, shown
        shown += character
    return shown


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_training_told_to_end_is_saved_and_says_how_to_go_on(folder, start, kind):
    values = {
        "model": json.loads((folder / "model" / "config.json").read_text()),
        "batch_size": 4,
        "steps": 10**6,
        "sample_every": 0,
        "log_every": 1,
        "device": "cpu",
    }
    (folder / "train.json").write_text(json.dumps(values))
    process = start(command("train", "--config", "train.json", "--output", "out"))
    header = wait_for(process, "images/s")
    assert "data: 1,437 training images of digits, 360 for validation" in header
    os.killpg(process.pid, kind)
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + kind
    assert output.startswith("out\n")
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith(f"ecar: stopped by {kind.name} and saved at step ")
    assert last.endswith("of 1000000; go on with: ecar train --resume out")
    step = int(last.split("step ")[1].split()[0])
    words = ("--resume", "out", "--steps", str(step + 1), "--no-progress")
    output, errors = start(command("train", *words)).communicate(timeout=TIMEOUT)
    assert f"{step + 1} steps in " in output, errors


def test_ctrl_c_is_130_without_a_traceback(folder, start):
    process = start(command("sample", "--checkpoint", "model", "--steps", "1000000"))
    wait_for(process, "step/s")
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, output) == (130, "")
    assert "Traceback" not in errors
    assert errors.endswith("ecar: interrupted\n")
    assert not (folder / "samples.png").exists()


def test_a_reader_that_goes_away_is_no_error(start):
    process = start(command("info", "--preset", "digits", "--steps", "2"))
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(timeout=TIMEOUT)
    assert (process.returncode, errors) == (128 + signal.SIGPIPE, "")

"""Killed and resumed is the same as never killed; what does not fit is refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ecar.config import ECARConfig
from ecar.training import TrainConfig, Trainer
from ecar.training.state import read_header, state_path

ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys
from ecar.training import TrainConfig, Trainer
config = TrainConfig.from_json(sys.argv[1])
Trainer(config, resume=sys.argv[2] == "resume", progress=False).run()
"""


def start(config: TrainConfig, mode: str, folder: Path) -> subprocess.Popen:
    path = folder / f"{Path(config.output_dir).name}.json"
    config.to_json(path)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path), mode],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def same_files(one: Path, other: Path, name: str) -> None:
    left, right = load_file(one / name), load_file(other / name)
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), f"{name}: {key}"


def test_sigkill_and_resume_end_with_the_same_bits(make_config, read_log, tmp_path):
    """A real kill at a random moment of a training of 80 steps that saves at every fifth."""
    fields = {"steps": 80, "batch_size": 16, "log_every": 4, "save_every": 5, "flip": True}
    whole = make_config(output_dir=str(tmp_path / "whole"), **fields)
    broken = make_config(output_dir=str(tmp_path / "broken"), **fields)
    assert start(whole, "new", tmp_path).wait() == 0
    process = start(broken, "new", tmp_path)
    state = state_path(broken.output_dir)
    moment = random.choice(range(5, 61, 5))
    while not state.exists() or read_header(state)[1]["step"] < moment:
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.03))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was still at work
    step = read_header(state)[1]["step"]
    assert 0 < step < 80
    # A kill in the middle of a row leaves half of one.
    with open(tmp_path / "broken" / "log.csv", "a") as file:
        file.write("79,12")
    assert start(broken, "resume", tmp_path).wait() == 0

    same_files(tmp_path / "whole", tmp_path / "broken", "state/state.safetensors")
    same_files(tmp_path / "whole", tmp_path / "broken", "model.safetensors")
    logs = [read_log(tmp_path / name) for name in ("whole", "broken")]
    assert logs[0]["step"] == list(range(4, 81, 4))
    for column in logs[0].keys() - {"images_per_second", "seconds"}:
        assert logs[0][column] == logs[1][column], column


def finished(config, dataset) -> Trainer:
    instance = Trainer(config, dataset=dataset, progress=False)
    instance.run()
    return instance


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mixed_precision": "bf16"},
        {"stage_weights": (1.0, 3.0), "ema_decay": (0.9999, 0.3)},
        {
            "stage_weights": "uncertainty",
            "tau": "logit-normal",
            "model": ECARConfig.preset("digits", width=16, heads=2, ar_layers=0, flow_blocks=1),
        },
    ],
)
def test_more_steps_than_planned(make_config, images, tmp_path, fields):
    fields = {"log_every": 3, **fields}
    whole = finished(make_config(steps=7, output_dir=str(tmp_path / "whole"), **fields), images)
    finished(make_config(steps=4, **fields), images)
    longer = Trainer.resume(str(tmp_path / "run"), steps=7, dataset=images, progress=False)
    assert longer.step == 4
    result = longer.run()
    assert result.step == 7 and result.seconds > 0
    for name, tensor in whole._tensors().items():
        assert torch.equal(longer._tensors()[name], tensor), name


def test_a_finished_training_has_nothing_to_do(make_config, images):
    first = finished(make_config(), images)
    result = Trainer.resume(first.output, dataset=images, progress=False).run()
    assert (result.step, result.losses) == (4, [])


def test_what_decides_no_weight_may_change(make_config, images):
    finished(make_config(), images)
    config = make_config(steps=5, log_every=2, save_every=3, sample_every=5, num_workers=1)
    Trainer(config, dataset=images, resume=True, progress=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0.5}, "'learning_rate' is 0.001 there, 0.5 here"),
        ({"batch_size": 4}, "'batch_size' is 8 there, 4 here"),
        ({"stage_weights": (1.0, 1.0)}, "'stage_weights' is 'gradnorm' there"),
        ({"tau": "logit-normal"}, "'tau' is 'uniform' there, 'logit-normal' here"),
        ({"ema_decay": (0.9999, 0.5)}, "'ema_decay' is 0.9999 there"),
        (
            {"schedule": "linear"},
            "'schedule' is 'constant' there, 'linear' here .the learning rates",
        ),
        ({"steps": 3}, "already at step 4, past steps 3"),
        ({"model": ECARConfig.preset("digits", width=32)}, "model 'width' is 16 there, 32 here"),
    ],
)
def test_another_configuration_is_refused(make_config, images, changes, words):
    first = finished(make_config(), images)
    before = first.state_path.read_bytes()
    with pytest.raises(ValueError, match=words) as raised:
        Trainer(make_config(**changes), dataset=images, resume=True)
    assert str(first.state_path) in str(raised.value) and "\n" not in str(raised.value)
    assert first.state_path.read_bytes() == before


def test_a_decaying_schedule_keeps_its_length(make_config, images):
    finished(make_config(schedule="cosine"), images)
    with pytest.raises(ValueError, match=r"'steps' is 4 there, 8 here \(the learning rates"):
        Trainer(make_config(schedule="cosine", steps=8), dataset=images, resume=True)


def test_a_constant_training_ends_with_a_decay(make_config, images, tmp_path, read_log):
    """Resumed as "wsd", it is what a training planned so would have been."""
    wsd = {"schedule": "wsd", "steps": 8, "decay_steps": 4, "log_every": 1}
    whole = finished(make_config(output_dir=str(tmp_path / "whole"), **wsd), images)
    finished(make_config(steps=4, log_every=1), images)
    resumed = Trainer.resume(str(tmp_path / "run"), dataset=images, progress=False, **wsd)
    resumed.run()
    for name, tensor in whole._tensors().items():
        assert torch.equal(resumed._tensors()[name], tensor), name
    assert read_log(tmp_path / "run")["lr"] == pytest.approx(
        [1e-3] * 5 + [0.75e-3, 0.5e-3, 0.25e-3]
    )
    with pytest.raises(ValueError, match="the learning rates of the steps so far would differ"):
        Trainer.resume(
            str(tmp_path / "run"), dataset=images, schedule="constant", decay_steps=0, steps=9
        )


def spoil_cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_cut_in_header(path):
    path.write_bytes(path.read_bytes()[:100])


def spoil_text(path):
    path.write_text("state")


def spoil_empty(path):
    path.write_bytes(b"")


def rewrite(path, *, drop=(), metadata=None, **tensors):
    config, header = read_header(path)
    kept = {name: value for name, value in load_file(path).items() if name not in drop}
    save_file(
        {**kept, **tensors},
        path,
        metadata={
            "format": "ecar training state",
            "version": "1",
            "train": json.dumps(config.to_dict()),
            "header": json.dumps(header),
            **(metadata or {}),
        },
    )


def spoil_format(path):
    rewrite(path, metadata={"format": "pt"})


def spoil_version(path):
    rewrite(path, metadata={"version": "9"})


def spoil_metadata(path):
    rewrite(path, metadata={"header": "{}"})


def spoil_missing(path):
    rewrite(path, drop=["adamw/step"])


def spoil_unknown(path):
    rewrite(path, more=torch.zeros(1))


def spoil_shape(path):
    rewrite(path, **{"model/ar.norm.weight": torch.zeros(3)})


def spoil_nan(path):
    rewrite(path, **{"model/ar.norm.weight": torch.full((16,), float("nan"))})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_cut, "not a safetensors file, or cut short"),
        (spoil_cut_in_header, "not a safetensors file, or cut short"),
        (spoil_text, "not a safetensors file, or cut short"),
        (spoil_empty, "not a safetensors file, or cut short"),
        (spoil_format, "not a training state, its format is 'pt'"),
        (spoil_version, "expected state version 1, got '9'"),
        (spoil_metadata, "damaged metadata"),
        (spoil_missing, "lacks tensor 'adamw/step'"),
        (spoil_unknown, "has the unknown tensor 'more'"),
        (spoil_shape, r"tensor 'model/ar.norm.weight' is torch.float32 \[3\], expected"),
        (spoil_nan, "tensor 'model/ar.norm.weight' holds NaN"),
    ],
)
def test_a_spoiled_state_is_refused_and_left_as_it_is(make_config, images, spoil, words):
    first = finished(make_config(), images)
    spoil(first.state_path)
    before = {path: path.read_bytes() for path in first.output.rglob("*") if path.is_file()}
    for attempt in (
        lambda: Trainer(make_config(), dataset=images, resume=True),
        lambda: Trainer.resume(first.output, dataset=images),
    ):
        with pytest.raises(ValueError, match=words) as raised:
            attempt()
        assert str(first.state_path) in str(raised.value) and "\n" not in str(raised.value)
    after = {path: path.read_bytes() for path in first.output.rglob("*") if path.is_file()}
    assert after == before


def test_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="no training to resume"):
        Trainer.resume(tmp_path)


def test_a_save_that_fails_leaves_the_state_before(make_config, images, monkeypatch):
    """The disk fills up while the state is written."""
    first = finished(make_config(steps=4), images)
    before = first.state_path.read_bytes()
    longer = Trainer.resume(first.output, steps=8, dataset=images, progress=False)

    def full(tensors, path, **_):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ecar.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        longer.run()
    assert first.state_path.read_bytes() == before
    assert [path.name for path in first.state_path.parent.iterdir()] == [first.state_path.name]

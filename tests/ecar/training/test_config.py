"""TrainConfig: validation by name, JSON, learning rate schedules."""

import json
import math

import pytest

from ecar.config import ECARConfig
from ecar.training import TrainConfig


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("steps", 0, ValueError),
        ("steps", 1.5, TypeError),
        ("batch_size", -1, ValueError),
        ("batch_size", True, TypeError),
        ("learning_rate", 0.0, ValueError),
        ("learning_rate", math.nan, ValueError),
        ("learning_rate", "fast", TypeError),
        ("weight_decay", -0.1, ValueError),
        ("betas", (0.9,), TypeError),
        ("betas", (0.9, 1.0), ValueError),
        ("warmup_steps", -1, ValueError),
        ("schedule", "step", ValueError),
        ("tau", "normal", ValueError),
        ("ema_decay", 1.1, ValueError),
        ("ema_decay", "long", TypeError),
        ("ema_decay", (), ValueError),
        ("ema_decay", (0.9, 1.1), ValueError),
        ("ema_decay", (0.9, 0.9), ValueError),
        ("label_dropout", 2.0, ValueError),
        ("stage_weights", "equal", TypeError),
        ("stage_weights", (1.0,), ValueError),
        ("stage_weights", (1.0, -1.0), ValueError),
        ("stage_weights", (0, 0), ValueError),
        ("gradnorm_alpha", -1.0, ValueError),
        ("gradnorm_lr", 0, ValueError),
        ("grad_clip", 0.0, ValueError),
        ("mixed_precision", "fp8", ValueError),
        ("tf32", 1, TypeError),
        ("gradient_accumulation", 3, ValueError),
        ("seed", 2**63, ValueError),
        ("log", "wandb", ValueError),
        ("device", "gpu", ValueError),
        ("output_dir", "", TypeError),
        ("data_root", 3, TypeError),
        ("model", "S", TypeError),
    ],
)
def test_impossible_values_are_refused_by_name(make_config, field, value, error):
    with pytest.raises(error, match=rf"argument '{field}(\[\d\])?': expected") as raised:
        make_config(**{field: value})
    assert "\n" not in str(raised.value)


def test_sheets_need_a_step_for_each_stage(make_config):
    with pytest.raises(ValueError, match="argument 'sample_steps': expected at least one per"):
        make_config(sample_every=1, sample_steps=1)
    assert make_config(sample_every=0, sample_steps=1).sample_steps == 1


def test_latents_are_not_mirrored(make_config):
    with pytest.raises(ValueError, match="argument 'flip': expected False for dataset 'latents'"):
        make_config(dataset="latents", flip=True)


def test_decay_needs_steps_after_the_warm_up(make_config):
    with pytest.raises(ValueError, match="argument 'warmup_steps': expected fewer than steps 4"):
        make_config(schedule="linear", warmup_steps=4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"schedule": "wsd"},
            "expected from 1 to steps - warmup_steps = 3 for schedule 'wsd', got 0",
        ),
        ({"schedule": "wsd", "decay_steps": 4}, "= 3 for schedule 'wsd', got 4"),
        ({"decay_steps": 2}, "expected 0 for schedule 'constant', got 2"),
    ],
)
def test_decay_steps_are_of_wsd_alone(make_config, fields, words):
    with pytest.raises(ValueError, match=f"argument 'decay_steps': .*{words}"):
        make_config(warmup_steps=1, **fields)


def test_gradnorm_needs_ar_layers(make_config):
    model = ECARConfig.preset("digits", ar_layers=0)
    words = "argument 'stage_weights': expected 'uncertainty' or 2 numbers .* got 'gradnorm'"
    with pytest.raises(ValueError, match=words):
        make_config(model=model)
    for weights in ("uncertainty", (1.0, 1.0)):
        assert make_config(model=model, stage_weights=weights).stage_weights == weights


def test_json_round_trip(make_config, tmp_path):
    config = make_config(
        stage_weights=[1, 2], betas=[0.8, 0.9], ema_decay=[0.9999, 0.999], grad_clip=None
    )
    config.to_json(tmp_path / "train.json")
    assert TrainConfig.from_json(tmp_path / "train.json") == config
    assert config.stage_weights == (1.0, 2.0)
    assert config.averages == {"ema": 0.9999, "ema_0.999": 0.999}
    assert make_config(ema_decay=0.5).averages == {"ema": 0.5}


def test_label_dropout_comes_from_the_model(make_config):
    model = ECARConfig.preset("digits", class_dropout=0.25)
    assert make_config(model=model).label_dropout == 0.25
    assert make_config(model=model, label_dropout=0.0).label_dropout == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object of fields"),
        ('{"output_dir": "x"}', "'model' is missing"),
        ('{"model": {"stages": 3}, "output_dir": "x"}', "'stages': no such field"),
    ],
)
def test_bad_files_are_refused_with_their_path(tmp_path, text, words):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as raised:
        TrainConfig.from_json(path)
    assert str(path) in str(raised.value)


def test_unknown_fields_are_refused(make_config):
    with pytest.raises(ValueError, match="'lr': no such field"):
        TrainConfig.from_dict({**make_config().to_dict(), "lr": 1})


def test_values_are_json(make_config):
    json.dumps(make_config(stage_weights=(1, 2)).to_dict())


def test_schedules(make_config):
    constant = make_config(steps=100, warmup_steps=10, learning_rate=0.5)
    rates = [constant.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert set(rates[10:]) == {0.5}
    for schedule, middle in (("linear", 0.25), ("cosine", 0.25)):
        config = constant.replace(schedule=schedule)
        rates = [config.learning_rate_at(step) for step in range(10, 101)]
        assert rates == sorted(rates, reverse=True)
        assert rates[0] == 0.5
        assert rates[45] == pytest.approx(middle)
        assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert constant.replace(schedule="cosine").learning_rate_at(40) == pytest.approx(
        0.25 * (1 + math.cos(math.pi / 3))
    )
    wsd = constant.replace(schedule="wsd", decay_steps=20)
    rates = [wsd.learning_rate_at(step) for step in range(101)]
    assert rates[:80] == [constant.learning_rate_at(step) for step in range(80)]
    assert rates[80:] == pytest.approx([0.5 * left / 20 for left in range(20, -1, -1)])

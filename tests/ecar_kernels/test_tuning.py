"""Measured launch settings: which are chosen, what a bad file does, how they are measured."""

import json
import warnings
from dataclasses import dataclass, replace

import pytest
import torch

from ecar_kernels import tune, tuning

NAME = "NVIDIA Test (80GB)"


@dataclass(frozen=True)
class Settings:
    block_m: int
    num_stages: int
    early: bool = False


USUAL = Settings(64, 3)


def choice(rows, block_m, key=(768, 2), op="op", **more):
    return {
        "op": op,
        "key": list(key),
        "rows": rows,
        "settings": {"block_m": block_m, "num_stages": 3, "early": True} | more,
    }


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The user's file, which is not there yet; nothing is shipped."""
    monkeypatch.setattr(tuning, "_name", lambda device: NAME)
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(tmp_path / "own"))
    tuning.forget()
    yield tmp_path / "own" / tuning.file_name(NAME)
    tuning.forget()


def chosen(rows=16, key=(768, 2), op="op", device=0):
    return tuning.choose(op, key, rows, USUAL, device)


def test_without_a_file_or_a_gpu_the_usual_settings_are_taken(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() is USUAL
        assert chosen(device=None) is USUAL


@pytest.mark.parametrize(("rows", "block"), [(1, 16), (16, 16), (60, 16), (70, 32), (9999, 32)])
def test_the_nearest_measured_rows_decide(path, rows, block):
    tuning.write(path, NAME, [choice(16, 16), choice(256, 32)])  # 64 lies in the middle
    assert chosen(rows) == Settings(block, 3, True)
    assert chosen(rows) is chosen(rows)


def test_the_users_own_go_before_the_shipped(path):
    tuning.write(tuning.SHIPPED / path.name, NAME, [choice(16, 16), choice(256, 16)])
    tuning.write(path, NAME, [choice(16, 128)])
    assert (chosen(16).block_m, chosen(256).block_m) == (128, 16)


def test_a_missing_key_is_warned_about_once(path):
    tuning.write(path, NAME, [choice(16, 16)])
    with pytest.warns(UserWarning, match=r"none for other of \(768, 2\)"):
        assert chosen(op="other") is USUAL
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(key=(1, 2)) is USUAL


GOOD = {"format": 1, "device": NAME, "choices": [choice(16, 16)]}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not valid JSON"),
        ("[" * 100000, "not valid JSON"),
        ("[]", "expected 'format' to be 1"),
        (GOOD | {"format": 2}, "expected 'format' to be 1, got '2'"),
        (GOOD | {"device": "other"}, "expected 'device' to be"),
        (GOOD | {"choices": {}}, "expected 'choices' to be a list"),
        (GOOD | {"choices": [1]}, "expected an object"),
        (GOOD | {"choices": [choice(0, 16)]}, "'rows' to be positive"),
        (GOOD | {"choices": [choice(True, 16)]}, "'rows' to be of type int"),
        (GOOD | {"choices": [choice(16, 48)]}, "expected a power of two, got 48"),
        (GOOD | {"choices": [choice(16, -16)]}, "an integer from 1 to 4096, got -16"),
        (GOOD | {"choices": [choice(16, "__import__('os')")]}, "an integer from 1"),
        (GOOD | {"choices": [choice(16, 16, key=(1.5,))]}, "'key' to hold integers"),
        (GOOD | {"choices": [choice(16, 16, splits=2)]}, "another version"),
    ],
)
def test_a_bad_file_is_one_warning_and_the_usual_settings(path, content, problem):
    path.parent.mkdir()
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.warns(UserWarning, match="ecar tune") as caught:
        assert chosen() is USUAL
        assert chosen(17) is USUAL
    assert len(caught) == 1
    assert problem in str(caught[0].message)


def test_what_cannot_be_read_is_never_written(path):
    tuning.write(path, NAME, [choice(16, 16)])
    with pytest.raises(ValueError, match="power of two"):
        tuning.write(path, NAME, [choice(16, 48)])
    assert chosen().block_m == 16
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def measured(seconds, answers):
    """Measures the settings of `seconds` by block_m, on a clock that knows their times."""

    def run():
        return [answers.get(chosen().block_m, torch.ones(8))]

    def clock(run):
        block = chosen().block_m
        if seconds[block] is None:
            raise RuntimeError("out of resources")
        return lambda: seconds[block]

    candidates = tuple(replace(USUAL, block_m=block) for block in seconds)
    problem = tune.Problem("op", (768, 2), 16, USUAL, candidates, run)
    return tune.measure(problem, clock, rounds=3)


def test_the_fastest_right_setting_is_chosen():
    nothing = torch.full((8,), torch.nan)
    found = measured(
        {64: 1.0, 16: 0.5, 32: 0.1, 128: None, 256: 0.2}, {32: torch.ones(8) * 1.001, 256: nothing}
    )
    assert found.settings.block_m == 16
    assert (found.seconds, found.usual_seconds, found.tried, found.wrong) == (0.5, 1.0, 2, 3)
    assert found.entry()["settings"] == {"block_m": 16, "num_stages": 3, "early": False}


def test_noise_does_not_replace_the_usual_settings():
    assert measured({64: 1.0, 16: 0.99}, {}).settings is USUAL
    assert chosen(device=None) is USUAL  # nothing stays forced


def test_interpreted_kernels_are_not_timed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in tune.why_not()

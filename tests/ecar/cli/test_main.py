"""What all commands share: help, errors of one line, exit codes, tracebacks of our own bugs."""

import json
import re

import numpy as np
import pytest

import ecar.cli.info
from ecar.cli import COMMANDS, main

from ..conftest import full_disk


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert re.fullmatch(r"ecar \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"  ecar {command} --" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["sample", "info", "evaluate", "evaluate --dataset digits"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "checkpoint 'nowhere': no such folder"),
        ("./no/where", "checkpoint './no/where': no such folder"),
        ("file", "checkpoint 'file': not a folder"),
        ("someone/nothing", r"checkpoint 'someone/nothing': no such folder, and not had from"),
    ],
)
def test_missing_checkpoint_is_one_line(folder, refused, command, name, message):
    (folder / "file").write_text("no folder")
    assert refused(f"{command} --checkpoint {name}").startswith(message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "a command is needed: sample, train, cache, evaluate, steps, info, tune"),
        ("draw", "no command 'draw'; commands are sample"),
        ("--colour", "unrecognized arguments: --colour"),
        ("sample", "the following arguments are required: --checkpoint"),
        ("info", "one of the arguments --preset --checkpoint --config is required"),
        ("info --preset XXL", "--preset: invalid choice: 'XXL'"),
        ("info --preset S --checkpoint x", "not allowed with argument"),
        ("info --preset S --steps 0", "--steps: expected a positive whole number"),
        ("info --preset S --steps 2", "--steps: expected at least one step for each of 3 stages"),
        ("info --preset S --guidance inf", "--guidance: expected a finite number, got inf"),
    ],
)
def test_bad_command_line_is_one_line(refused, line, message):
    assert message in refused(line)


@pytest.mark.parametrize(
    "error",
    [AssertionError("a bug"), RuntimeError("a bug"), KeyError("a bug"), IndexError("a bug")],
    ids=repr,
)
def test_our_own_bugs_keep_their_traceback(run, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ecar.cli.info, "count_parameters", fail)
    with pytest.raises(type(error), match="a bug"):
        run("info --preset digits --steps 2")


@pytest.mark.parametrize(
    "accident",
    [lambda *_: int("x"), lambda *_: None + 1, lambda *_: np.zeros(3).reshape(2)],
    ids=["int", "None + 1", "reshape"],
)
def test_accidents_are_not_the_users_even_as_value_errors(run, monkeypatch, accident):
    monkeypatch.setattr(ecar.cli.info, "count_parameters", accident)
    with pytest.raises((TypeError, ValueError)):
        run("info --preset digits --steps 2")


def test_interruption_is_130(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ecar.cli.info, "count_parameters", interrupt)
    code, _, errors = run("info --preset digits --steps 2")
    assert (code, errors) == (130, "ecar: interrupted\n")


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("sample --checkpoint model --steps 2 --sheet 1x1 --no-progress --output x.png", "x.png"),
        ("sample --checkpoint model --steps 2 --sheet 1x1 --no-progress --output new",
         "new/class0-seed000000.png"),
        ("evaluate --checkpoint model --dataset digits --samples 4 --steps 2 --no-progress "
         "--output r.json", "r.json"),
        ("evaluate --checkpoint model --dataset digits --samples 4 --steps 2 --no-progress "
         "--npz s.npz", "s.npz"),
        ("train --config t.json --output run --no-progress", "run/pipeline.json"),
        ("train --resume old --steps 2 --no-progress", "old/"),
    ],
)  # fmt: skip
def test_a_full_disk_is_one_line(folder, run, line, file):
    """And what lies there is as it was."""
    config = json.loads((folder / "model" / "config.json").read_text())
    values = {"model": config, "steps": 1, "batch_size": 2, "sample_every": 0, "device": "cpu"}
    (folder / "t.json").write_text(json.dumps(values))
    if "--resume" in line:
        assert run("train --config t.json --output old --no-progress")[0] == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with full_disk():
        code, _, errors = run(line)
    assert code == 2
    assert errors.startswith("ecar: error: ") and errors.count("\n") == 1
    assert file in errors and "File too large" in errors
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

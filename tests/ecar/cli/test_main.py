"""What all commands share: help, errors of one line, exit codes, tracebacks of our own bugs."""

import importlib
import re

import numpy as np
import pytest
import torch

import ecar.cli.info
from ecar.cli import COMMANDS, main
from ecar.cli.parser import Parser, UsageError


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


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_is_explained_in_a_line(command):
    """Of 100 columns, next to a column of 24; what it takes has a name."""
    module = importlib.import_module(f"ecar.cli.{command}")
    parser = Parser(prog=f"ecar {command}")
    module.add_arguments(parser)
    wrong = {}
    for action in parser._actions:
        text, takes = (action.help or "").replace("%%", "%"), action.nargs != 0
        named = action.metavar is not None or action.choices is not None
        if not 0 < len(text) <= 74 or "\n" in text or text[-1] == "." or (takes and not named):
            wrong[action.option_strings[0]] = text
    assert not wrong


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_value_is_refused_by_every_flag(command):
    """An unset variable of the shell: as a path it would be the folder one is in."""
    parser = Parser(prog=f"ecar {command}")
    importlib.import_module(f"ecar.cli.{command}").add_arguments(parser)
    for part in (*parser._actions, *parser._mutually_exclusive_groups):
        part.required = False
    flags = [one.option_strings[0] for one in parser._actions if one.nargs != 0]
    assert flags
    for flag in flags:
        with pytest.raises(UsageError, match=rf"{flag}: .*''"):
            parser.parse_args([flag, ""])


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
        ("", f"a command is needed: {', '.join(COMMANDS)}"),
        ("draw", "no command 'draw'; commands are sample"),
        ("sampel", "no command 'sampel'; near it: sample"),
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


def too_much():
    return torch.empty(2**60)


def too_much_for_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nSee ..")


@pytest.mark.parametrize("allocate", [too_much, too_much_for_a_gpu, lambda: np.empty(2**56)])
@pytest.mark.parametrize("command", ["sample", "info", "cache"])
def test_out_of_memory_is_one_line_with_the_way_out(run, monkeypatch, command, allocate):
    module = importlib.import_module(f"ecar.cli.{command}")
    monkeypatch.setattr(module, "run", lambda arguments: allocate())
    line = {
        "sample": "sample --checkpoint x",
        "info": "info --preset S",
        "cache": "cache --dataset x --vae y --output z",
    }[command]
    code, output, errors = run(line)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    way_out = "" if command == "info" else "; a smaller --batch-size needs less"
    assert errors.startswith(f"ecar: error: out of memory{way_out} (")


@pytest.mark.parametrize(
    "accident",
    [lambda *_: int("x"), lambda *_: None + 1, lambda *_: np.zeros(3).reshape(2)],
    ids=["int", "None + 1", "reshape"],
)
def test_accidents_are_not_the_users_even_as_value_errors(run, monkeypatch, accident):
    monkeypatch.setattr(ecar.cli.info, "count_parameters", accident)
    with pytest.raises((TypeError, ValueError)):
        run("info --preset digits --steps 2")

"""Every benchmark's command keeps what is measured when it is interrupted, and merges its rows."""

import functools
import importlib

import pytest

from benchmarks import commands, results

# Module -> what an interrupted command is given; its rows' list, and the two rows of two cases.
COMMANDS = {
    "busy": ("rows", {"waits": "ecar's", "busy": 0}, {"waits": "ecar's", "busy": 2}),
    "end_to_end": ("rows", {"size": "S"}, {"size": "B"}),
    "gemm": ("rows", {"name": "a"}, {"name": "b"}),
    "int8": ("rates", {"weights": 1, "tokens": 16}, {"weights": 1, "tokens": 256}),
    "integrations": (
        "rows",
        {"model": "MAR-B", "dtype": "float32", "threads": 1},
        {"model": "MAR-B", "dtype": "float32", "threads": 2},
    ),
    "memory": ("sampling", {"size": "S"}, {"size": "B"}),
    "micro": (
        "rows",
        {"op": "adaln", "tokens": 16, "batch": 1},
        {"op": "adaln", "tokens": 64, "batch": 1},
    ),
    "paper.ablation": ("rows", {"size": "S"}, {"size": "B"}),
    "paper.complexity": ("rows", {"way": "in stages"}, {"way": "token by token"}),
    "paper.table2": ("rows", {"model": "E-CAR-S"}, {"model": "E-CAR-B"}),
    "paper.table3": ("rows", {"size": "S"}, {"size": "B"}),
    "quality": ("rows", {"solver": "euler", "calls": 8}, {"solver": "euler", "calls": 12}),
    "runtimes": ("rows", {"name": "a"}, {"name": "b"}),
}


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Calls a command, whose first cases have these rows; the others are interrupted."""
    real = commands.run

    def called(name, rows, *arguments):
        def run(cases, *given, **how):
            left = iter(rows)

            def measure():
                if (found := next(left, None)) is None:
                    raise KeyboardInterrupt
                return found

            return real(dict.fromkeys([*cases, "one more", "and another"], measure), *given, **how)

        monkeypatch.setattr(commands, "run", run)
        monkeypatch.setattr("sys.argv", ["x", "--results", str(tmp_path), *arguments])
        main = importlib.import_module(f"benchmarks.{name}").main
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code

    return called


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupt_keeps_what_was_measured(name, call, tmp_path, monkeypatch, capsys):
    where, first, second = COMMANDS[name]
    module = importlib.import_module(f"benchmarks.{name}")
    if name == "micro":
        rates = functools.partial(module.timing.Rates, 1e9, 1e9)
        monkeypatch.setattr(module.timing, "measure_rates", lambda *_: (rates(), {}))
        monkeypatch.setattr(module, "_said", lambda row: "done")
    monkeypatch.setattr(results, "keep_memory", lambda: None)  # for good
    assert call(name, [{where: [first | {"x": 1}]}]) == commands.INTERRUPTED
    (file,) = tmp_path.glob("*/*.json")
    assert results.read(file)[where] == [first | {"x": 1, "run": 0}]
    said = capsys.readouterr()
    assert "[1/" in said.out and f"interrupted; rows measured before are in {file}" in said.err
    # Once more, with two: the first row is replaced, the second added.
    both = [{where: [first | {"x": 2}]}, {where: [second]}]
    assert call(name, both) == commands.INTERRUPTED
    rows = sorted(results.read(file)[where], key=lambda row: row.get("x", 3))
    assert [row.get("x") for row in rows] == [2, None]


def test_every_command_that_writes_results_is_in_the_table():
    """But for trainings, which go on from their folders, and the GPU's, whose rows are written as
    they are printed."""
    kinds = {"training", "gpu", "example"}
    from benchmarks.report import KINDS

    modules = {
        module.removeprefix("benchmarks.") for kind, module in KINDS.items() if kind not in kinds
    }
    assert modules == set(COMMANDS)


def test_another_protocol_is_not_merged(tmp_path):
    file, rows = tmp_path / "x.json", {"rows": [{"name": "a"}]}
    assert commands.run({"a": lambda: rows}, file, "gemm", groups=2)[1] == 0
    with pytest.raises(SystemExit, match=r"x\.json has groups 2, not 4"):
        commands.run({"a": lambda: rows}, file, "gemm", groups=4)


def test_what_fails_does_not_end_the_others(tmp_path, capsys):
    def fails():
        raise RuntimeError("no luck")

    file = tmp_path / "x.json"
    found = commands.run({"a": fails, "b": lambda: {"rows": [{"name": "b"}]}}, file, "gemm")
    assert found[1] == 1 and [row["name"] for row in found[0]["rows"]] == ["b"]
    assert "a: FAILED: RuntimeError: no luck" in capsys.readouterr().out
    assert commands.finish(*found, file, lambda record: "a table") == 1


def test_cases_that_are_not_measured_by_default_are_listed(capsys):
    ablation = importlib.import_module("benchmarks.paper.ablation")
    assert ablation.main(arguments=["--list"]) == 0
    assert capsys.readouterr().out.split() == ["E-CAR-S", "E-CAR-B", "E-CAR-L"]

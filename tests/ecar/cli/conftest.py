import pytest

from ecar.cli import main
from ecar.pipeline import ECARPipeline

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def pipe(make_model):
    return ECARPipeline(make_model(), class_names=NAMES, defaults={"num_inference_steps": 4})


@pytest.fixture
def folder(pipe, tmp_path):
    """The working folder, which holds the checkpoint "model"."""
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run a command line in the working folder: its exit code, output, and errors."""
    monkeypatch.chdir(tmp_path)

    def run(line):
        capsys.readouterr()
        code = main(line.split())
        output, errors = capsys.readouterr()
        return code, output, errors

    return run


@pytest.fixture
def refused(run, tmp_path):
    """Run a command line that is wrong: its one line."""

    def refused(line):
        before = sorted(tmp_path.rglob("*"))
        code, output, errors = run(line)
        assert (code, output) == (2, "")
        assert errors.startswith("ecar: error: ")
        assert errors.count("\n") == 1
        assert errors.endswith("\n")
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return errors[len("ecar: error: ") : -1]

    return refused

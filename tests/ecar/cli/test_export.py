"""`ecar export`: programs in a folder, or one line."""

import json
import sys

import pytest

LINE = "export --checkpoint model --output new"


def test_files_are_written_and_named(folder, run):
    code, output, errors = run(f"{LINE} --format torch --steps 2,3 --guidance 2")
    assert (code, errors) == (0, "")
    names = ["begin1.pt2", "step1.pt2", "begin2.pt2", "step2.pt2", "export.json"]
    assert output.splitlines() == [f"new/{name}" for name in names]
    assert sorted(path.name for path in (folder / "new").iterdir()) == sorted(names)
    facts = json.loads((folder / "new" / "export.json").read_text())
    assert [len(row["times"]) for row in facts["stages"]] == [2, 3]
    assert facts["stages"][1]["guidance_scale"] == [2.0] * 3
    assert facts["class_names"][0] == "zero"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("export --checkpoint model --format onnx", "arguments are required: --output"),
        (f"{LINE} --format tflite", "--format: invalid choice: 'tflite'"),
        (f"{LINE} --format torch --solver heun", "--solver: expected euler or ab2, got 'heun'"),
        (f"{LINE} --format torch --steps 1", "--steps: expected at least one step for each of 2"),
        ("export --checkpoint model --format torch --output model/config.json", "not a folder"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_cannot_be_is_one_line(refused, line, message):
    assert message in refused(line)


@pytest.mark.usefixtures("folder")
def test_what_is_missing_is_one_line(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    message = refused(f"{LINE} --format onnx")
    assert message.startswith("--format: 'onnx' needs onnx, onnxruntime, onnxscript")
    assert message.endswith("pip install 'ecar[onnx]'")
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = refused(f"{LINE} --format aoti")
    assert message == (
        "--format: 'aoti' needs a C++ compiler ($CXX), and there is no 'no-such-compiler'"
    )

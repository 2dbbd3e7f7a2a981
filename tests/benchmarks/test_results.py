"""How results are written, read and shown."""

import json

import pytest

from benchmarks import results


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.234e-6, "1.23 us"),
        (45.6e-3, "45.6 ms"),
        (7.891, "7.89 s"),
        (0.0009996, "1.00 ms"),
        (1234.5, "1234 s"),
        (None, "-"),
    ],
)
def test_durations_have_three_figures(seconds, text):
    assert results.duration(seconds) == text


def test_a_record_is_read_as_it_was_written(tmp_path):
    facts, file = results.describe(), tmp_path / "new" / "x.json"
    row = {"name": "a", "seconds": 1.0}
    written = results.merge(file, "micro", facts, {"rows": [row]}, lambda row: row["name"], more=2)
    assert written == {"kind": "micro", "runs": [facts], "rows": [row | {"run": 0}], "more": 2}
    assert results.read(file) == written
    assert [path.name for path in file.parent.iterdir()] == ["x.json"]


def test_what_is_no_record_is_refused_by_name(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: not valid JSON"):
        results.read(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="with 'kind'"):
        results.read(file)


def test_a_file_has_a_line_for_each_row(tmp_path):
    file = tmp_path / "x.json"
    record = {
        "kind": "gpu",
        "runs": [{"versions": {"torch": "2"}}],
        "parts": {"a": {"rows": [{"x": [1, {"y": 2}]}, {"x": 3}], "seconds": 1.5}, "b": {}},
        "rows": [],
        "counts": {str(i): i for i in range(21)},
    }
    results.save(file, record)
    assert json.loads(file.read_text()) == record
    lines = [line.strip(" ,") for line in file.read_text().splitlines()]
    assert '{"x": [1, {"y": 2}]}' in lines and '{"x": 3}' in lines and '"20": 20' in lines
    assert '{"versions": {"torch": "2"}}' in lines and '"rows": []' in lines


def test_tables_line_up():
    text = results.markdown(("a", "b"), [("long name", "1"), ("x", "1000")])
    assert len({len(line) for line in text.splitlines()}) == 1

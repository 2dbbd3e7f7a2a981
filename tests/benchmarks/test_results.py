"""How results are timed, summed up, written and shown."""

import itertools
import json

import pytest

from benchmarks import environment, results, table, timing
from tests.benchmarks.support import python


def test_variants_take_turns():
    order = []

    def turns(name):
        return itertools.repeat(lambda: order.append(name))

    times = timing.interleave({"a": turns("a"), "b": turns("b")}, 0, min_rounds=3)
    assert order == ["a", "b"] * 3
    assert [len(values) for values in times.values()] == [3, 3]
    times = timing.interleave({"a": turns("a")}, 60, max_rounds=7)
    assert len(times["a"]) == 7


def test_summaries_are_quartiles_of_one_call():
    summary = timing.summary([1.0, 2.0, 3.0, 4.0, 5.0], unit=10)
    assert summary == {"rounds": 5, "min": 0.1, "q1": 0.2, "median": 0.3, "q3": 0.4, "max": 0.5}
    assert timing.summary([2.0])["q3"] == 2.0


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
    facts, file = environment.describe(), tmp_path / "new" / "x.json"
    results.write(file, "micro", facts, rows=[])
    record = results.read(file)
    assert record["kind"] == "micro" and record["environment"] == facts and record["rows"] == []
    assert [path.name for path in file.parent.iterdir()] == ["x.json"]


def test_what_is_no_record_is_refused_by_name(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: expected a result as JSON"):
        results.read(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="with 'kind'"):
        results.read(file)
    file.write_text(json.dumps({"kind": "soup", "environment": environment.describe()}))
    out = python("-m", "benchmarks.table", str(file), status=2)
    assert "'kind': expected one of" in out and "'soup'" in out and "Traceback" not in out
    assert table.RENDERERS.keys() >= {"micro", "gemm", "end_to_end", "table3", "memory"}


def test_tables_line_up():
    text = results.markdown(("a", "b"), [("long name", "1"), ("x", "1000")])
    assert len({len(line) for line in text.splitlines()}) == 1

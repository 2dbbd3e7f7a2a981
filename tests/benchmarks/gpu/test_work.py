"""A part's rows."""

import time

from benchmarks import results
from benchmarks.gpu import work


def test_no_row_is_begun_that_cannot_end(capsys):
    late = work.Work("image", "images", deadline=time.time() + 5)
    assert late.begins("a", 1) and not late.begins("b", 10)
    skipped = "no time left: it takes about 10 s"
    assert late.rows == [{"part": "images", "name": "b", "skipped": skipped}]
    assert "images: b: no time left" in capsys.readouterr().out


def test_a_later_run_replaces_its_rows_alone(tmp_path, capsys):
    for threads, names in ((1, "ab"), (2, "b")):
        facts = results.describe() | {"dry_run": True, "threads": threads}
        its = work.Work("check", "accuracy", tmp_path / "x.json", dry=True, facts=facts)
        for name in names:
            its.add(name, seconds=1.0)
    record = results.read(tmp_path / "x.json")
    assert [(row["name"], row["run"]) for row in record["rows"]] == [("a", 0), ("b", 1)]
    lines = [" ".join(line.split()) for line in work.render(record).splitlines()]
    assert "| a | 1.00 s | 1 |" in lines and "| b | 1.00 s | 2 |" in lines

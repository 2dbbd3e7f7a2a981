"""A part's rows."""

import time

from benchmarks.gpu import work


def test_no_row_is_begun_that_cannot_end(capsys):
    late = work.Work("image", "images", deadline=time.time() + 5)
    assert late.begins("a", 1) and not late.begins("b", 10)
    skipped = "no time left: it takes about 10 s"
    assert late.rows == [{"part": "images", "name": "b", "skipped": skipped}]
    assert "images: b: no time left" in capsys.readouterr().out

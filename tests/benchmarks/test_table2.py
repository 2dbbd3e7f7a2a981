"""Table 2's counts."""

import pytest

from benchmarks.paper import table2


def test_counts_are_the_papers_to_a_few_percent():
    rows = {row["model"]: row for model in table2.PAPERS for row in table2.count(model)["rows"]}
    assert rows["E-CAR-L"]["parameters"] == pytest.approx(859.2e6, rel=0.01)
    assert rows["DiT-XL/2"]["multiply_adds"] == pytest.approx(59.3e12, rel=0.01)
    text = table2.render({"rows": list(rows.values())})
    assert "| E-CAR-L " in text and "| 859.2 M | 854 M |" in " ".join(text.split())

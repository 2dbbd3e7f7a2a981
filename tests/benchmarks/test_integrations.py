"""The timings of other libraries' blocks: which there are, their rows, and how they are merged."""

import pytest
import torch

from benchmarks import integrations, report, results
from benchmarks.integrations import MODELS, Case, _case, cases
from ecar_kernels import foreign


def test_every_integration_has_a_row():
    with torch.device("meta"):
        kinds = {type(model.make()).__name__ for model in MODELS.values()}
    named = {name.rpartition(".")[2] for name in foreign.integrations} - {"SiTBlock"}
    assert kinds == named
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names) >= 2 * len(MODELS)


def row(case, plain=2.0):
    seconds = {"plain": {"median": plain}, "accelerated": {"median": 1.0}}
    return case._asdict() | {"class": "a block", "served": {}, "seconds": seconds}


def merged(record, facts, row):
    return results.merged(record, facts, {"rows": [row]}, _case)


def test_rows_are_merged_by_case():
    empty = {"kind": "integrations", "runs": [], "rows": []}
    first = results.describe() | {"date": "2026-01-01"}
    second = first | {"date": "2026-01-02", "threads": 3}
    one, other = Case("MAR-B", "float32", 1), Case("DiT-XL", "bfloat16", 2)
    later = first | {"date": "2026-01-03", "load_before": 9.0}
    record = merged(merged(empty, first, row(one)), later, row(other))
    assert [each["run"] for each in record["rows"]] == [0, 0] and record["runs"] == [first]
    record = merged(record, second, row(one, 3.0))
    assert [each["run"] for each in record["rows"]] == [1, 0]
    record = merged(record, second, row(other, 1.5))
    assert record["runs"] == [second]
    table = report.render(record)
    assert "1.00 s, 3.00x" in table and "1.00 s, 1.50x" in table and "2026-01-02" in table


def test_the_command(tmp_path, capsys, monkeypatch):
    """At a tiny size: the row is in the file, once, however often it is measured."""
    tiny = integrations.SimpleMLPAdaLN(4, 16, 8, 1)
    shapes = integrations.given(x=(2, 4), t=(2,), c=(2, 8))
    monkeypatch.setitem(MODELS, "MAR-B", integrations.Model(lambda: tiny, shapes))
    monkeypatch.setattr(results, "keep_memory", lambda: None)  # for good
    command = ["-k", "MAR-B", "bfloat16", "1 threads", "--results", str(tmp_path)]
    for _ in range(2):
        assert integrations.main([*command, "--seconds", "0"]) == 0
    file = results.path("integrations", tmp_path)
    (found,) = results.read(file)["rows"]
    assert found["model"] == "MAR-B" and found["class"] == "SimpleMLPAdaLN"
    assert found["served"]["adaln_linear"]
    assert f"merged into {file}" in capsys.readouterr().out
    assert integrations.main([*command, "--list"]) == 0
    assert capsys.readouterr().out == "MAR-B, bfloat16, 1 threads\n"
    with pytest.raises(SystemExit):
        integrations.main(["-k", "nothing", "--results", str(tmp_path)])

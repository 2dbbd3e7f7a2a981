"""The page of all results: complete, from whatever there is, and with pictures that exist."""

import json
import re

import pytest

from benchmarks import instructions, launches, report, results
from tests.benchmarks import test_micro
from tests.benchmarks.support import python

FACTS = results.describe()


@pytest.fixture
def folder(tmp_path):
    """Results of two devices, of which neither has all."""
    found = tmp_path / "results"
    results.save(found / "a-cpu" / "micro.json", test_micro.record(test_micro.row()))
    rows = [{"part": "build", "name": "build", "ok": False, "output": "# a log"}]
    facts = FACTS | {"dry_run": False}
    file = found / "b-gpu" / "gpu-check.json"
    results.save(file, {"kind": "gpu", "runs": [facts], "command": "check", "rows": rows})
    (found / "c-empty").mkdir()
    counts = {"avx2": {"adaln": 12345}, "baseline": {"adaln": 1, "pack": 2}}
    facts = {"machine": "x86_64", "compiler": "g++: 12", "valgrind": "3.19", "counts": counts}
    (found / instructions.RESULTS.name).write_text(json.dumps(facts))
    return found


def test_a_page_has_all_that_there_is(folder, tmp_path):
    output = tmp_path / "out"
    text = report.page(folder, output)
    headings = re.findall(r"^#+ .*", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    assert headings == [
        "# Results",
        "## a-cpu",
        "### micro",
        "## b-gpu",
        "### gpu-check",
        "## instructions",
    ]
    assert "A count depends on the compiler" in text.partition("## instructions")[2]
    assert "12,345" in text and "**build**" in text
    assert "# a log" in text  # in its fence, as it was
    links = re.findall(r"\]\((pictures/[^)]+)\)", text)
    assert links == ["pictures/a-cpu/micro.png"]
    assert (output / links[0]).is_file()


def test_without_results_it_says_so(tmp_path):
    assert "There are none in" in report.page(tmp_path, tmp_path)


@pytest.mark.skipif(not results.FOLDER.exists(), reason="an sdist has no results")
def test_the_command_needs_no_more_than_the_results_here(tmp_path):
    out = python("-m", "benchmarks.report", "--output", str(tmp_path))
    assert f"wrote {tmp_path / 'report.md'}" in out
    text = (tmp_path / "report.md").read_text("utf-8")
    files = list(results.FOLDER.glob("*/*.json"))
    for file in files:
        assert report.render(results.read(file)).splitlines()[0] in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "report.md"]
    out = python("-m", "benchmarks.report", str(files[0]))
    assert out.strip() == report.render(results.read(files[0])).strip()


@pytest.mark.skipif(not results.FOLDER.exists(), reason="an sdist has no results")
def test_every_kind_has_a_renderer():
    for file in results.FOLDER.glob("*/*.json"):
        assert results.read(file)["kind"] in report.KINDS, file.name


def test_what_is_no_result_is_refused_by_name(tmp_path):
    (tmp_path / "results" / "cpu").mkdir(parents=True)
    file = tmp_path / "results" / "cpu" / "x.json"
    file.write_text("{")
    given = ["-m", "benchmarks.report", "--output", str(tmp_path / "out"), "--results"]
    out = python(*given, str(tmp_path / "results"), status=2)
    assert "x.json: not valid JSON" in out and "Traceback" not in out
    out = python(*given, str(tmp_path / "none"), status=2)
    assert "none" in out and "Traceback" not in out
    file.write_text(json.dumps({"kind": "soup", "runs": [FACTS]}))
    out = python("-m", "benchmarks.report", str(file), status=2)
    assert "'kind': expected one of" in out and "'soup'" in out and "Traceback" not in out


@pytest.mark.skipif(not results.FOLDER.exists(), reason="an sdist has no results")
def test_the_performance_page_has_the_committed_figures():
    """Those of its tables that are written by hand."""
    text = (results.ROOT / "docs" / "performance.md").read_text("utf-8")
    rows = [" ".join(line.split()) for line in text.splitlines() if line.startswith("| ")]
    file = results.FOLDER / "amd-epyc-family-25-model-17" / "ablation.json"
    (whole, *others) = results.read(file)["rows"][0]["seconds"].values()
    for found in others:
        assert any(row.endswith(f"| {found['median'] / whole['median']:.2f}x |") for row in rows)
    for row in json.loads(launches.RESULTS.read_text("utf-8"))["rows"]:
        if row["accelerated"] and not row["guided"]:
            steps = " / ".join(str(sum(step.values())) for step in row["steps"])
            assert f"| {row['size']} | {steps} | {sum(row['image'].values()):,} |" in rows

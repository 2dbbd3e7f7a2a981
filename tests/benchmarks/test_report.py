"""The page of all results: complete, from whatever there is, and with pictures that exist."""

import json
import re

import pytest

from benchmarks import environment, instructions, report, results, table
from tests.benchmarks.support import python
from tests.benchmarks.test_pictures import GPU, MICRO

FACTS = environment.describe()


@pytest.fixture
def folder(tmp_path):
    """Results of two devices, of which neither has all."""
    found = tmp_path / "results"
    results.write(
        found / "a-cpu" / "micro.json",
        "micro",
        FACTS,
        rates=MICRO["rates"],
        rows=[
            row
            | {
                "seconds": {
                    name: value for name, value in row["seconds"].items() if isinstance(value, dict)
                },
                "floor_seconds": 1e-7,
            }
            for row in MICRO["rows"][:3]
        ],
        left_out=0,
    )
    results.write(found / "a-cpu" / "soup.json", "soup", FACTS)
    gpu = GPU["environment"] | {"dry_run": False}
    results.write(
        found / "b-gpu" / "gpu.json",
        "gpu",
        gpu,
        parts={
            name: part | {"status": "done", "seconds": 3.0, "output": "# no heading"}
            for name, part in GPU["parts"].items()
        }
        | {
            "build": {
                "status": "cut off after 2 s",
                "seconds": 2.0,
                "rows": [],
                "output": "# a log",
            }
        },
    )
    (found / "c-empty").mkdir()
    (found / instructions.RESULTS.name).write_text(
        json.dumps(
            {
                "machine": "x86_64",
                "compiler": "g++: 12",
                "valgrind": "3.19",
                "counts": {"avx2": {"adaln": 12345}, "baseline": {"adaln": 1, "pack": 2}},
            }
        )
    )
    return found


def test_a_page_has_all_that_there_is(folder, tmp_path):
    output = tmp_path / "out"
    text = report.page(folder, output)
    headings = re.findall(r"^#+ .*", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    assert headings == [
        "# Results",
        f"## {FACTS['device']}, {FACTS['cores']} cores",
        "### Every op",
        "### soup",
        "## NVIDIA H100",
        "### On this GPU",
        "#### GPU results",
        "##### rates",
        "##### micro",
        "##### build",
        "## Instructions of the C++ kernels",
    ]
    assert "no table for results of kind 'soup'" in text
    assert "12,345" in text and "cut off after 2 s" in text
    assert "# a log" in text  # in its fence, as it was
    links = re.findall(r"\]\((pictures/[^)]+)\)", text)
    assert len(links) == 8
    assert all((output / link).is_file() for link in links)
    for target in re.findall(r"^- \[.*\]\(#(.*)\)$", text, re.M):
        assert target in {report._anchor(heading.lstrip("# ")) for heading in headings}


def test_without_results_it_says_so(tmp_path):
    assert "There are none in" in report.page(tmp_path, tmp_path)


@pytest.mark.skipif(not results.FOLDER.exists(), reason="an sdist has no results")
def test_the_command_needs_no_more_than_the_results_here(tmp_path):
    out = python("-m", "benchmarks.report", "--output", str(tmp_path))
    assert f"wrote {tmp_path / 'report.md'}" in out
    text = (tmp_path / "report.md").read_text("utf-8")
    for file in results.FOLDER.glob("*/*.json"):
        assert table.render(results.read(file)).splitlines()[0] in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "report.md"]


def test_what_is_no_result_is_refused_by_name(tmp_path):
    (tmp_path / "results" / "cpu").mkdir(parents=True)
    (tmp_path / "results" / "cpu" / "x.json").write_text("{")
    out = python(
        "-m",
        "benchmarks.report",
        "--results",
        str(tmp_path / "results"),
        "--output",
        str(tmp_path / "out"),
        status=2,
    )
    assert "x.json: expected a result as JSON" in out and "Traceback" not in out
    out = python("-m", "benchmarks.report", "--results", str(tmp_path / "none"), status=2)
    assert "none" in out and "Traceback" not in out

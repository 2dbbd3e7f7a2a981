"""The committed launches of a sampling step (benchmarks/launches.py) are those of this code."""

import copy
import itertools
import json

import pytest

from benchmarks import launches

if not launches.RESULTS.exists():
    pytest.skip("an sdist has no results", allow_module_level=True)
RECORD = json.loads(launches.RESULTS.read_text("utf-8"))
ROWS = RECORD["rows"]


@pytest.mark.parametrize(
    ("size", "accelerated", "guided"),
    [
        *(("S", *how) for how in itertools.product((False, True), repeat=2)),
        ("B", True, True),
        ("L", True, False),
    ],
)
def test_no_more_than_committed(size, accelerated, guided):
    row = launches.count(size, accelerated=accelerated, guided=guided)
    assert not launches.compare([row], ROWS), "more launches; else python -m benchmarks.launches"
    assert launches.compare(ROWS, [row])  # nor are the committed ones other rows


def test_every_size_is_committed_within_its_target():
    expected = set(itertools.product(launches.SIZES, (False, True), (False, True)))
    assert {(row["size"], row["accelerated"], row["guided"]) for row in ROWS} == expected
    assert RECORD["target"] == launches.TARGET
    for row in ROWS:
        assert all(sum(step.values()) <= launches.TARGET[row["size"]] for step in row["steps"])
        assert all(set(part) <= set(launches.KINDS) for part in (*row["steps"], *row["ar"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda row: row["steps"][1].update(aten=1),
            "a step at stage 2: 24 launches, 23 committed",
        ),
        (lambda row: row["ar"][0].update(copy=2), "AR at stage 1: "),
        (lambda row: row["image"].update(triton=10**6), "an image: "),
        (lambda row: row.update(size="XL"), "not among the committed counts"),
    ],
)
def test_one_launch_more_is_seen(change, said):
    row = copy.deepcopy(ROWS[0])
    assert launches.compare([row], ROWS) == []
    change(row)
    (complaint,) = launches.compare([row], ROWS)
    assert said in complaint


def test_the_table():
    table = launches.render(RECORD)
    assert "| S, plain " in table and "| L, accelerated, guided " in table
    assert RECORD["versions"]["triton"] in table

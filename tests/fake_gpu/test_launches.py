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
    ("size", "accelerated", "guided", "solver"),
    [
        *(("S", *how) for how in itertools.product((False, True), (False, True), launches.SOLVERS)),
        ("B", True, True, "euler"),
        ("L", True, False, "ab2"),
    ],
)
def test_no_more_than_committed(size, accelerated, guided, solver):
    row = launches.count(size, accelerated=accelerated, guided=guided, solver=solver)
    assert not launches.compare({"rows": [row]}, RECORD), (
        "more launches; else python -m benchmarks.launches"
    )
    assert launches.compare(RECORD, {"rows": [row]})  # nor are the committed ones other rows


def test_every_size_is_committed_within_its_target():
    both = (False, True)
    expected = set(itertools.product(launches.SIZES, both, both, launches.SOLVERS))
    keys = ("size", "accelerated", "guided", "solver")
    assert {tuple(row[key] for key in keys) for row in ROWS} == expected
    assert RECORD["target"] == launches.TARGET
    for row in ROWS:
        assert all(sum(step.values()) <= launches.TARGET[row["size"]] for step in row["steps"])
        assert all(set(part) <= set(launches.KINDS) for part in (*row["steps"], *row["ar"]))


def test_a_solver_of_several_steps_launches_what_eulers_method_does():
    for euler, ab2 in zip(ROWS[::2], ROWS[1::2], strict=True):
        assert ab2 == euler | {"solver": "ab2"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row["steps"][1].update(aten=1), "a step at stage 2: 24, 23 committed"),
        (lambda row: row["ar"][0].update(copy=2), "AR at stage 1: "),
        (lambda row: row["image"].update(triton=10**6), "an image: "),
        (lambda row: row.update(size="XL"), ": 23, new"),
    ],
)
def test_one_launch_more_is_seen(change, said):
    row = copy.deepcopy(ROWS[0])
    assert launches.compare({"rows": [row]}, RECORD) == []
    change(row)
    complaint, *others = launches.compare({"rows": [row]}, RECORD)
    assert said in complaint
    assert len(others) == (6 if row["size"] == "XL" else 0)  # of a new row, each of its parts


def test_the_table():
    table = launches.render(RECORD)
    assert "| S, plain, euler " in table and "| L, accelerated, guided, ab2 " in table
    assert RECORD["versions"]["triton"] in table

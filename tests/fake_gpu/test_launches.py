"""The committed launches of a sampling step (benchmarks/launches.py) are those of this code."""

import copy
import itertools
import json

import pytest
import torch

import ecar_kernels
from benchmarks import launches
from ecar import ECARConfig, split_steps
from ecar_kernels import costs
from ecar_kernels.flow_block import triton
from tools.fake_gpu import H100

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
        if row["accelerated"]:  # 5 of a layer, and the last norm
            most = 5 * ECARConfig.preset(row["size"]).ar_layers + 1
            assert all(sum(stage.values()) <= most for stage in row["ar"])
        assert all(set(part) <= set(launches.KINDS) for part in (*row["steps"], *row["ar"]))


@pytest.mark.parametrize(
    ("size", "images", "sides"),
    [("S", 1, (8, 16, 32, 64)), ("L", 1, (32, 64)), ("S", 8, (8, 16, 32)), ("B", 64, (32,))],
)
def test_no_more_for_many_rows(size, images, sides):
    """Guided: 2,048 rows of an image of 1,024 tokens, 4,096 of 8 images of 256, 32,768 of 64."""
    found = launches.count_rows(size, images=images, stage_sides=sides)
    config = ECARConfig.preset(size)
    assert len(found["steps"]) == len(found["ar"]) == len(sides)
    for step, ar in zip(found["steps"], found["ar"], strict=True):
        assert step == {"triton": 5 * config.flow_blocks, "c++": 1}
        assert ar == {"triton": 5 * config.ar_layers, "aten": 1}


def test_a_solver_of_several_steps_launches_what_eulers_method_does():
    for euler, ab2 in zip(ROWS[::2], ROWS[1::2], strict=True):
        assert ab2 == euler | {"solver": "ab2"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row["steps"][1].update(aten=1), "a step at stage 2: 12, 11 committed"),
        (lambda row: row["ar"][0].update(copy=2), "AR at stage 1: "),
        (lambda row: row["image"].update(triton=10**6), "an image: "),
        (lambda row: row.update(size="XL"), ": 11, new"),
    ],
)
def test_one_launch_more_is_seen(change, said):
    row = copy.deepcopy(ROWS[0])
    assert launches.compare({"rows": [row]}, RECORD) == []
    change(row)
    complaint, *others = launches.compare({"rows": [row]}, RECORD)
    assert said in complaint
    assert len(others) == (6 if row["size"] == "XL" else 0)  # of a new row, each of its parts


@pytest.mark.parametrize(
    ("size", "setting", "chip"),
    [
        ("S", "default", "NVIDIA H100 80GB HBM3"),
        ("L", "250 Euler steps", "NVIDIA H200"),
        ("B", "default", "NVIDIA L4"),
    ],
)
def test_the_committed_prediction_is_of_this_code(size, setting, chip):
    row = launches.predict(size, setting, costs.CHIPS[chip])
    assert row in RECORD["predicted"], "else python -m benchmarks.launches --update"
    assert launches.predicted_seconds(size, setting, chip) == row["seconds"]
    assert launches.predicted_seconds(size, setting, "another chip") is None


def test_what_a_prediction_counts():
    """A launch for each counted one; the weights of each step, and of its modulation, at least."""
    predicted = {(row["chip"], row["size"], row["setting"]): row for row in RECORD["predicted"]}
    assert len(predicted) == len(costs.CHIPS) * len(launches.SIZES) * len(launches.SETTINGS)
    for (chip, size, setting), row in predicted.items():
        config = ECARConfig.preset(size)
        steps = sum(split_steps(launches.SETTINGS[setting][0], config.num_stages))
        assert row["bytes"] > 2 * 12 * steps * config.flow_blocks * config.width**2
        assert row["waves"] >= row["launches"] > steps
        assert row["launching"] < row["seconds"]
        if (chip, setting) == (RECORD["chip"], "250 Euler steps"):
            (counted,) = (
                its["image"]
                for its in ROWS
                if (its["size"], its["accelerated"], its["guided"], its["solver"])
                == (size, True, False, "euler")
            )
            assert row["launches"] == sum(counted.values())


def test_an_op_has_its_cost_once():
    """Arguments, result, and the sums and statistics that adaln_linear keeps for itself."""
    with launches._fake_gpu(H100) as gpu:
        x, weight = (torch.empty(*n, device="cuda") for n in ((1, 16, 768), (2304, 768)))
        ecar_kernels.adaln_linear(x, x, x, weight, None, activation=None)
        torch.addmm(torch.empty(8, device="cuda"), x[0], weight[:8].t())
        *fused, torchs = gpu.launches
        gpu.clear()
        kept = torch.empty(2, 1, 16, 768, device="cuda").unbind()
        kept = {"keys": kept[0], "values": kept[1], "scale_offset": 0.0}
        triton.adaln_linear_chained(x, x, x, weight, None, **kept)
        (cached,) = gpu.launches
    least = costs.Cost(4 * (3 * 16 * 768 + 2304 * 768 + 16 * 2304), 16 * 768 * 2304)
    total = sum((launch.cost for launch in fused), costs.Cost(0, 0))
    assert total.multiply_adds == least.multiply_adds
    assert least.bytes <= total.bytes <= least.bytes + 2 * 4 * 64 * 16 * 2304
    assert cached.cost == total  # the same outputs in three tensors
    assert torchs.cost == costs.Cost(4 * (8 + 16 * 768 + 8 * 768 + 16 * 8), 16 * 768 * 8)


def test_the_table():
    table = launches.render(RECORD)
    assert "\n| H100 80GB HBM3, S, 250 Euler steps " in table
    assert "| S, plain, euler " in table and "| L, accelerated, guided, ab2 " in table
    assert RECORD["versions"]["triton"] in table

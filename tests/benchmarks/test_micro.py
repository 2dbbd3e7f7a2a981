"""`make bench`: every case's inputs and costs are right, and a run writes a complete record."""

import functools
import itertools
import warnings

import pytest
import torch

from benchmarks import cases, environment, peers, results, table
from benchmarks.micro import table as micro_table
from benchmarks.micro import variants
from ecar_kernels.costs import BACKWARD_READS, Rates, floor_seconds
from ecar_kernels.registry import OPS
from tests.benchmarks.support import python
from tests.support.accuracy import assert_accurate

SMALL = cases.Arena(2**20, cases.DTYPE)


def some(op: str, backward: bool = False) -> cases.Case:
    return cases.Case(op, 16, 2, "-" if op in cases.WIDTHLESS else "S", backward)


WAYS = [
    some(op, backward)
    for op in OPS
    for backward in (False, True)
    if not backward or op in BACKWARD_READS
]


@pytest.mark.parametrize("case", WAYS, ids=lambda case: case.name)
def test_every_op_runs_forward_and_backward_as_the_reference_does(case):
    functions = variants.functions(case)
    sets = [cases.inputs(case, SMALL) for _ in range(2)]
    for name in ("eager", "ours"):
        turns = variants.calls(case, functions[name], sets)
        for call in itertools.islice(turns, 3):
            assert call() is not None
    assert variants.backend(case, functions["ours"]) in ("native", "reference")


def test_every_has_each_op_stage_size_and_batch():
    every = cases.every()
    assert len(every) == len(set(every))
    assert {case.op for case in every} == set(OPS)
    for op in ("adaln", "stage_attention"):
        found = {(c.size, c.tokens, c.batch) for c in every if c.op == op and c.backward}
        assert found >= set(itertools.product("SBL", (16, 64, 256), (1, 8, 32)))
        assert found >= {(cases.VAR, side**2, 1) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)}
        assert {size for size, *_ in found} >= {"S-512px", "S-1024px", "L-1024px"}
    assert set(cases.default()) < set(every)


def test_cases_at_64_mib_hold_that_much():
    for case in cases.at_64_mib():
        width = {"adaln": case.tokens * case.width if case.size != "-" else 0}
        side = 2 * 16
        count = width["adaln"] or 4 * side**2
        if case.op == "upsample_renoise_euler":
            count *= 4  # the image that it makes has twice the side
        assert case.batch * count * 4 == 64 * 2**20, case.name


@pytest.mark.parametrize("op", ["adaln", "euler_step", "linear_gated_residual"])
def test_sets_of_inputs_are_larger_than_the_cache_or_many(op, monkeypatch):
    monkeypatch.setattr(cases, "last_level_cache", lambda: 2**20)
    case = some(op)
    sets = list(cases.input_sets(case, cases.Arena(2**20, cases.DTYPE)))
    held = sum(
        value.numel() * value.element_size()
        for given in sets
        for value in given.values()
        if isinstance(value, torch.Tensor)
    )
    assert held >= cases.ROTATION * 2**20 or len(sets) == cases.MAX_SETS
    firsts = [given["x" if "x" in given else "h"] for given in sets[:2]]
    assert len(sets) == 1 or not torch.equal(*firsts)


def test_costs_are_those_of_the_sizes():
    n, c, b = 16, 768, 2
    cost = variants.case_cost(some("adaln"), cases.inputs(some("adaln"), SMALL))
    assert cost.bytes == 4 * (4 * b * n * c + 2 * c)  # x, shift, scale, y; two step parts
    assert cost.multiply_adds == 0
    case = some("adaln_linear")
    assert variants.case_cost(case, cases.inputs(case, SMALL)).multiply_adds == b * n * c * 4 * c
    case = cases.Case("stage_attention", 64, 1, "S")  # 64 queries see 16 + 64 keys
    assert variants.case_cost(case, cases.inputs(case, SMALL)).multiply_adds == 2 * 64 * 80 * c
    rates = Rates(bytes_per_second=1e9, multiply_adds_per_second=1e12)
    assert floor_seconds(cost, rates) == cost.bytes / 1e9


def test_a_run_writes_its_record(tmp_path):
    out = python(
        "-m",
        "benchmarks",
        "--results",
        str(tmp_path),
        "--seconds",
        "0.01",
        "-k",
        "(euler_step-forward and 16tokens and batch1) or test_overhead[euler_step]",
    )
    (file,) = tmp_path.glob("*/micro.json")
    assert f"wrote {file}" in out and "| euler_step" in out
    record = results.read(file)
    assert {"device", "threads", "versions", "load_before", "date"} <= record["environment"].keys()
    assert record["rates"]["bytes_per_second"] > 0 < record["rates"]["multiply_adds_per_second"]
    overhead, row = record["rows"]  # a call's cost comes first
    assert (row["op"], row["tokens"], row["batch"], row["backward"]) == ("euler_step", 16, 1, False)
    assert row["seconds"].keys() == {"eager", "compiled", "ours"} and row["failures"] == {}
    for seconds in (*row["seconds"].values(), *overhead["seconds"].values()):
        assert 0 < seconds["min"] <= seconds["q1"] <= seconds["median"] <= seconds["q3"]
    assert row["bytes"] == 4 * 3 * 4 * 8 * 8 and row["multiply_adds"] == 0
    assert row["floor_seconds"] == row["bytes"] / record["rates"]["bytes_per_second"]
    assert overhead["seconds"].keys() == {
        "ours",
        "api",
        "eager",
        "least",
        "api, least",
        "eager, least",
    }


def test_rows_without_time_are_left_out_and_said_so(tmp_path):
    out = python(
        "-m",
        "benchmarks",
        "--results",
        str(tmp_path),
        "--minutes",
        "1e-9",
        "-k",
        "euler_step-forward and 16tokens and batch1",
        status=1,
    )
    assert "minutes are over" in out and "error: nothing was measured" in out
    assert "7 rows were left out" in micro_table.render({"rows": [row()], "left_out": 7})


def row(**changes):
    seconds = {
        name: {"median": value}
        for name, value in (("eager", 4e-3), ("compiled", 3e-3), ("ours", 2e-3))
    }
    return {
        "op": "adaln",
        "size": "S",
        "tokens": 16,
        "batch": 1,
        "backward": True,
        "bytes": 2 * 10**6,
        "multiply_adds": 0,
        "floor_seconds": 1e-3,
        "seconds": seconds,
        "failures": {},
        **changes,
    }


def test_the_table_has_ratios_rates_and_the_fraction_of_the_floor():
    record = {
        "kind": "micro",
        "rows": [row(), row(op="adaln_linear", multiply_adds=10**9)],
        "environment": environment.describe(),
    }
    lines = table.render(record).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4]]
    assert cells[0] == [
        "adaln backward",
        "S",
        "16",
        "1",
        "2.00 ms",
        "2.00x",
        "1.50x",
        "1.0 GB/s",
        "50%",
    ]
    assert cells[1][7] == "1000.0 GFLOP/s"
    without = row(failures={"compiled": "Unsupported: a reason"})
    del without["seconds"]["compiled"]
    lines = micro_table.render({"rows": [without, row()]}).splitlines()
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")] == [
        "adaln backward",
        "torch.compile",
        "1 of 2",
        "Unsupported: a reason",
    ]


def test_the_table_has_a_row_for_each_peer_timed_or_not():
    timed = row(
        op="stage_attention",
        backward=False,
        whole=True,
        failures={"flash-attn": "ImportError: flash-attn is not installed"},
    )
    timed["seconds"]["SDPA math"] = {"median": 5e-3}
    lines = micro_table.render({"rows": [timed, timed]}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    name = "stage_attention, all stages"
    assert (
        cells.count([name, "S", "16", "1", "SDPA math", "5.00 ms", "2.50x", "0.4 GB/s", "20%"]) == 2
    )
    assert [name, "flash-attn", "2 of 2", "ImportError: flash-attn is not installed"] in cells


@pytest.mark.parametrize(
    "case",
    [
        cases.Case("stage_attention", 16, 1, "S"),
        cases.Case("stage_attention", 9, 1, cases.VAR, whole=True),
        cases.Case("stage_attention", 4, 2, cases.VAR, backward=True),
    ],
    ids=lambda case: case.name,
)
def test_attentions_peers_compute_the_same_or_say_why_not(case):
    given = cases.inputs(case, SMALL)
    functions = variants.functions(case)
    reasons, right = {}, 0
    for name in peers.functions(case.op):
        if (why := variants.why_not(case, name, functions[name], [given])) is not None:
            reasons[name] = why
            continue
        with torch.set_grad_enabled(case.backward):
            assert_accurate(functions[name], functions["eager"], given, gradients=case.backward)
        right += 1
    assert right >= 2  # SDPA's math and flash serve every machine
    assert set(reasons) <= {
        "FlexAttention",
        "SDPA efficient",
        "SDPA cudnn",
        "flash-attn",
        "xformers",
    }
    if case.backward and "FlexAttention" in reasons:
        assert "FlexAttention does not support backward" in reasons["FlexAttention"]


def test_a_call_by_stage_is_the_masked_one():
    """As flash-attn and xformers are asked for all stages."""
    case = cases.Case("stage_attention", 25, 2, cases.VAR, whole=True)
    given = cases.inputs(case, SMALL)
    reference = variants.functions(case)["eager"]

    def dense(q, k, v):
        return reference(
            q,
            k,
            v,
            (k.shape[1] - q.shape[1], q.shape[1]) if k.shape[1] > q.shape[1] else (k.shape[1],),
        )

    assert_accurate(functools.partial(peers._by_stage, dense), reference, given)


def test_scores_that_memory_does_not_hold_are_a_reason(monkeypatch):
    monkeypatch.setattr(variants, "_memory", lambda: 1000)
    case = cases.Case("stage_attention", 16, 1, "S")
    given = [cases.inputs(case, SMALL)]
    assert "its scores would take" in variants.why_not(case, "eager", None, given)
    ours = variants.functions(case)["ours"]
    assert variants.why_not(case, "ours", ours, given) is None
    assert (
        variants.why_not(
            some("adaln"),
            "eager",
            variants.functions(some("adaln"))["eager"],
            [cases.inputs(some("adaln"), SMALL)],
        )
        is None
    )


def test_reasons_are_one_line():
    def refused():
        warnings.warn("Flash attention kernel not used because:", stacklevel=1)
        warnings.warn("a mask was given.\nmore", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    assert peers.why_not(refused) == "RuntimeError: No available kernel; a mask was given."
    assert peers.why_not(lambda: None) is None

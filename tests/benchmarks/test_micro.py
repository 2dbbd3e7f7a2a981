"""`python -m benchmarks`: rows are right, and merged into what was measured before."""

import contextlib
import itertools
import json
import signal
import subprocess
import sys

import pytest

from benchmarks import cases, micro, results
from benchmarks.cases import Case
from ecar_kernels.costs import BACKWARD_READS, Rates, floor_seconds
from ecar_kernels.registry import OPS
from tests.benchmarks.support import ROOT, environment, python

NOISE = "euler_step-forward---16tokens-batch1"


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
    functions = micro.functions(case)
    sets = [cases.inputs(case) for _ in range(2)]
    for name in ("eager", "ours"):
        turns = micro.calls(case, functions[name], sets)
        for call in itertools.islice(turns, 3):
            assert call() is not None
    assert functions["ours"].backend in ("cpp", "sdpa", "reference")


def test_costs_are_those_of_the_sizes():
    n, c, b = 16, 768, 2
    cost = micro.case_cost(some("adaln"), cases.inputs(some("adaln")))
    assert cost.bytes == 4 * (4 * b * n * c + 2 * c)  # x, shift, scale, y; two step parts
    assert cost.multiply_adds == 0
    case = some("adaln_linear")
    assert micro.case_cost(case, cases.inputs(case)).multiply_adds == b * n * c * 4 * c
    case = cases.Case("stage_attention", 64, 1, "S")  # 64 queries see 16 + 64 keys
    assert micro.case_cost(case, cases.inputs(case)).multiply_adds == 2 * 64 * 80 * c
    rates = Rates(bytes_per_second=1e9, multiply_adds_per_second=1e12)
    assert floor_seconds(cost, rates) == cost.bytes / 1e9


def test_scores_that_memory_does_not_hold_are_a_reason(monkeypatch):
    monkeypatch.setattr(micro, "memory", lambda device: 1000)
    case = cases.Case("stage_attention", 16, 1, "S")
    given = [cases.inputs(case)]
    assert "its scores would take" in micro.why_not(case, "eager", None, given)
    ours = micro.functions(case)["ours"]
    assert micro.why_not(case, "ours", ours, given) is None
    assert (
        micro.why_not(
            some("adaln"),
            "eager",
            micro.functions(some("adaln"))["eager"],
            [cases.inputs(some("adaln"))],
        )
        is None
    )


def row(run=0, ours=2e-3, **changes):
    ways = {"eager": 4e-3, "compiled": 3e-3, "ours": ours}
    return {
        "op": "adaln",
        "size": "S",
        "tokens": 16,
        "batch": 1,
        "backward": False,
        "whole": False,
        "bytes": 2 * 10**6,
        "multiply_adds": 0,
        "floor_seconds": 1e-3,
        "seconds": {name: {"median": value} for name, value in ways.items()},
        "failures": {},
        "run": run,
        **changes,
    }


def this(**changes):
    rates = {"bytes_per_second": 1e9, "multiply_adds_per_second": 1e10}
    return results.describe() | changes | {"rates": rates}


def merged(before, run, rows):
    return results.merged(before, run, {"rows": rows}, micro.case_of)


def record(*rows):
    return {"kind": "micro", "runs": [this()], "rows": list(rows)}


class TestMerging:
    def test_other_rows_stay_with_the_run_that_measured_them(self):
        before = record(row(), row(tokens=64), row(backward=True))
        after = merged(before, this(threads=99), [row(tokens=64, ours=1e-3)])
        assert [found["tokens"] for found in after["rows"]] == [16, 64, 16]
        assert [found["run"] for found in after["rows"]] == [0, 1, 0]
        assert after["rows"][1]["seconds"]["ours"]["median"] == 1e-3
        assert after["rows"][0] == before["rows"][0] and after["rows"][2] == before["rows"][2]
        assert [run["threads"] for run in after["runs"]] == [before["runs"][0]["threads"], 99]

    def test_a_run_without_rows_is_dropped(self):
        after = merged(record(row()), this(threads=99), [row(ours=1e-3)])
        assert [run["threads"] for run in after["runs"]] == [99]
        assert after["rows"][0]["run"] == 0

    def test_what_differs_is_another_row(self):
        changes = [{}, {"batch": 2}, {"size": "L"}, {"backward": True}, {"whole": True}]
        rows = [row(**change) for change in [*changes, {"overhead": True}]]
        assert len(merged(record(), this(), rows)["rows"]) == len(rows)


def test_a_failure_keeps_the_rows_before_it(tmp_path, monkeypatch):
    file, real = tmp_path / "micro.json", micro.measure

    def measure(case, *rest):
        if case.tokens == 64:
            raise KeyboardInterrupt
        return real(case, *rest)

    monkeypatch.setattr(micro, "measure", measure)
    chosen = [Case("euler_step", tokens, 1) for tokens in (16, 64, 256)]
    with pytest.raises(SystemExit):
        micro.run(chosen, file, seconds=0.01)
    assert [found["tokens"] for found in results.read(file)["rows"]] == [16]


def test_every_row_has_a_name_of_its_own():
    few, all_rows = ([case.name for case in micro.choose(full)] for full in (False, True))
    assert NOISE in few and {f"{op}-overhead" for op in OPS} <= set(few) < set(all_rows)
    assert len(all_rows) == len(set(all_rows))


class TestCommand:
    def test_filtered_runs_add_up(self, tmp_path):
        command = ["-m", "benchmarks", "--results", str(tmp_path), "--seconds", "0.01", "-k"]
        out = python(*command, NOISE)
        (file,) = tmp_path.glob("*/micro.json")
        assert f"merged into {file}" in out and "| euler_step" in out
        assert "[1/1, " in out and f" min] {NOISE}: " in out
        python(*command, "euler_step-overhead")
        found = results.read(file)
        timed, overhead = found["rows"]
        assert len(found["runs"]) == 2 and (timed["run"], overhead["run"]) == (0, 1)
        rates = found["runs"][0]["rates"]
        assert rates["bytes_per_second"] > 0 < rates["multiply_adds_per_second"]
        assert {"device", "threads", "versions", "date"} <= found["runs"][0].keys()
        assert timed["seconds"].keys() == {"eager", "compiled", "ours"} and timed["failures"] == {}
        for seconds in (*timed["seconds"].values(), *overhead["seconds"].values()):
            assert 0 < seconds["q1"] <= seconds["median"] <= seconds["q3"]
        assert timed["bytes"] == 4 * 3 * 4 * 8 * 8 and timed["multiply_adds"] == 0
        assert timed["floor_seconds"] == timed["bytes"] / rates["bytes_per_second"]

    def test_rows_without_time_are_left_out(self, tmp_path):
        command = ["-m", "benchmarks", "--results", str(tmp_path), "--minutes", "1e-9", "-k", NOISE]
        out = python(*command, status=1)
        assert "1 rows were left out" in out and "error: nothing was measured" in out

    def test_an_interrupt_ends_it_with_what_was_measured(self, tmp_path):
        process = subprocess.Popen(
            [sys.executable, "-um", "benchmarks", f"--results={tmp_path}", "--seconds=0.01"],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=(tmp_path / "error.txt").open("w"),
            text=True,
        )
        next(line for line in process.stdout if line.startswith("[1/"))
        process.send_signal(signal.SIGINT)
        # Not communicate(): torch.compile's workers have the pipe, too, and end later.
        process.wait(timeout=120)
        error = (tmp_path / "error.txt").read_text()
        assert process.returncode == 130 and "interrupted" in error and "Traceback" not in error
        (file,) = tmp_path.glob("*/micro.json")
        assert len(json.loads(file.read_text())["rows"]) >= 1

    def test_the_list_names_the_rows(self):
        out = python("-m", "benchmarks", "--list", "-k", "euler_step", "16tokens")
        assert NOISE in (names := out.splitlines())
        assert all("euler_step" in name and "16tokens" in name for name in names)
        out = python("-m", "benchmarks", "-k", "no-such-row", status=2)
        assert "argument -k: no row's name contains all of no-such-row" in out

    @pytest.mark.parametrize("module", ["", ".end_to_end", ".memory", ".check", ".report"])
    def test_help_needs_no_extra(self, module):
        blocked = ["pytest", "matplotlib", "diffusers", "hypothesis", "sklearn"]
        code = (
            f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked})); "
            f"sys.argv = ['x', '--help']; "
            f"runpy.run_module('benchmarks{module or '.__main__'}', run_name='__main__')"
        )
        assert f"python -m benchmarks{module}" in python("-c", code)


def test_the_tables_have_ratios_rates_and_the_fraction_of_the_floor():
    peer = row(op="stage_attention", whole=True, failures={"SDPA cudnn": "RuntimeError: no"})
    peer["seconds"]["SDPA math"] = {"median": 5e-3}
    rows = [row(backward=True), row(op="adaln_linear", multiply_adds=10**9), peer]
    text = micro.render(record(*rows))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    times = ["2.00 ms", "2.00x", "1.50x"]
    assert ["adaln-backward-S-16tokens-batch1", *times, "1.0 GB/s", "50%"] in cells
    assert ["adaln_linear-forward-S-16tokens-batch1", *times, "1000.0 GFLOP/s", "50%"] in cells
    name = "stage_attention-whole-S-16tokens-batch1"
    assert [name, "SDPA math", "5.00 ms", "2.50x", "0.4 GB/s", "20%"] in cells
    assert ["stage_attention", "SDPA cudnn", "RuntimeError: no"] in cells
    said = results.environments(record())
    assert "copy 1.0 GB/s, GEMM 20 GFLOP/s" in said and "Run 1" not in said
    two = merged(record(row()), this(threads=99), [row(tokens=64)])
    lines = [" ".join(line.split()) for line in micro.render(two).splitlines()]
    assert lines[2].endswith("50% | 1 |") and lines[3].endswith("50% | 2 |")
    assert "99 threads" in results.environments(two).partition("Run 2: ")[2]
    without = row()
    del without["seconds"]["compiled"]
    assert "| 2.00x | - | 1.0 GB/s |" in " ".join(micro.render(record(without)).split())


def test_an_ops_overview_has_the_stages_of_s():
    rows = [
        row(tokens=tokens, batch=8 if backward else 1, backward=backward, size=size)
        for tokens in (16, 64, 256, 1024)
        for backward in (False, True)
        for size in "SL"
    ]
    text = micro.overview(record(*rows, row(batch=32), row(op="euler_step")), "adaln")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 6
    cells = ["forward, 16 tokens", "4.00 ms", "3.00 ms", "2.00 ms", "2.00x", "1.50x"]
    assert [cell.strip() for cell in lines[1].strip("|").split("|")] == cells
    assert "Forward: one image; backward: a batch of 8." in text
    assert micro.overview(record(), "adaln") == ""
    two = merged(record(row()), this(threads=99), [row(tokens=64)])
    assert ", 99 threads, float32, torch" in micro.overview(two, "adaln")


def test_pytest_benchmark_runs_a_row_by_every_way(tmp_path):
    file = tmp_path / "run.json"
    python(
        *("-m", "pytest", "-q", "-p", "no:xdist", str(ROOT / "benchmarks"), "--benchmark-only"),
        *("-k", NOISE, f"--benchmark-json={file}"),
    )
    found = json.loads(file.read_text())["benchmarks"]
    assert [entry["params"]["way"] for entry in found] == list(micro.OWN)
    assert all(entry["stats"]["min"] > 0 for entry in found)
    assert all(entry["extra_info"]["op"] == "euler_step" for entry in found)


def test_an_interrupt_that_was_swallowed_ends_a_run_after_its_row(tmp_path, monkeypatch):
    """What is measured may catch it, or be called from where no exception comes out."""
    file, real = tmp_path / "micro.json", micro.measure

    def measure(*given):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return real(*given)

    monkeypatch.setattr(micro, "measure", measure)
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        micro.run([Case("euler_step", tokens, 1) for tokens in (16, 64)], file, seconds=0.01)
    assert len(json.loads(file.read_text())["rows"]) == 1
    assert signal.getsignal(signal.SIGINT) is former

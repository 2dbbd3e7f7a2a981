"""The judging of `make bench-check`: a regression fails and is named, noise does not."""

import json

import pytest

from benchmarks import cases, check, instructions, micro, results
from tests.benchmarks.support import python

CASE = cases.Case("adaln", 256, 1, "S")
NAME = CASE.name


def row(eager=3e-3, compiled=2e-3, ours=1e-3, spread=0.02, **changes):
    """Medians, and the interquartile range as a share of each."""
    seconds = {
        name: {"median": value, "q1": value * (1 - spread / 2), "q3": value * (1 + spread / 2)}
        for name, value in (("eager", eager), ("compiled", compiled), ("ours", ours))
    }
    return {
        "op": CASE.op,
        "size": CASE.size,
        "tokens": CASE.tokens,
        "batch": CASE.batch,
        "backward": False,
        "whole": False,
        "seconds": seconds,
        **changes,
    }


def test_a_regression_is_a_loss_that_names_the_row_and_both_ratios():
    lost = check.judge(row(), row(ours=1.3e-3))
    assert [line.startswith(NAME) for line in lost] == [True, True]
    assert "vs eager 2.31x, was 3.00x: -23%, noise allows -15%" in lost[0]
    assert "vs torch.compile" in lost[1]


def test_a_machine_that_is_slower_altogether_is_none():
    assert check.judge(row(), row(eager=6e-3, compiled=4e-3, ours=2e-3)) == []


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.05, 0.3])
def test_a_loss_within_the_noise_is_none(spread):
    noise = check.noise(row(spread=spread), row(spread=spread), "eager")
    assert noise == pytest.approx(2 * spread)  # four ranges
    allowed = check.allowed(row(spread=spread), row(spread=spread), "eager")
    assert allowed == pytest.approx(max(1 - 1 / (1 + check.NOISE * noise), check.LEAST))
    slower = row(ours=1e-3 / (1 - allowed + 0.005), spread=spread)
    assert check.judge(row(spread=spread), slower) == []
    too_slow = row(ours=1e-3 / (1 - allowed - 0.005), spread=spread)
    assert len(check.judge(row(spread=spread), too_slow)) == 2


def test_noise_of_either_run_widens_what_is_allowed():
    slower = row(ours=1.3e-3)
    assert check.judge(row(), slower)
    assert not check.judge(row(spread=0.2), slower)
    assert not check.judge(row(), row(ours=1.3e-3, spread=0.2))


def test_a_loss_beyond_any_noise_is_one():
    """Where rounds differ by more than their median."""
    assert check.judge(row(spread=1.5), row(spread=1.5)) == []
    assert len(check.judge(row(spread=1.5), row(ours=1, spread=1.5))) == 2


def test_a_way_that_was_not_timed_is_not_judged():
    without = row(ours=1.3e-3)
    del without["seconds"]["compiled"]
    assert len(check.judge(row(), without)) == 1


@pytest.fixture
def committed(tmp_path):
    file = tmp_path / "micro.json"
    write(file, results.describe())
    return file


def write(file, facts):
    other = row(run=0, overhead=True)
    results.save(file, {"kind": "micro", "runs": [facts], "rows": [row(run=0), other]})


def run(monkeypatch, committed, *measured):
    """check_ratios, where the runs one after another measure these rows."""
    turns = iter(measured)
    monkeypatch.setattr(check, "measure", lambda *_: {micro.case_of(r): r for r in [next(turns)]})
    well = check.check_ratios(committed, 0.1, 1)
    assert next(turns, None) is None, "a run too few"
    return well


def test_what_is_as_committed_is_measured_once(monkeypatch, committed, capsys):
    assert run(monkeypatch, committed, row(ours=1.02e-3))
    assert "1 rows of 1, none lost" in capsys.readouterr().out


def test_a_loss_counts_if_it_is_seen_twice(monkeypatch, committed, capsys):
    assert not run(monkeypatch, committed, row(ours=1.3e-3), row(ours=1.4e-3))
    assert f"LOST: {NAME}: vs eager 2.14x, was 3.00x" in capsys.readouterr().out
    assert run(monkeypatch, committed, row(ours=1.3e-3), row())


def test_a_run_that_measured_nothing_is_no_success(monkeypatch, committed):
    monkeypatch.setattr(check, "measure", lambda *_: {})
    assert not check.check_ratios(committed, 0.1, 1)


@pytest.mark.parametrize(
    "change", [{"threads": 99}, {"device": "an abacus"}, {"versions": {"torch": "0.1"}}]
)
def test_other_machines_results_are_not_compared(monkeypatch, tmp_path, capsys, change):
    facts, file = results.describe() | change, tmp_path / "micro.json"
    write(file, facts)
    assert run(monkeypatch, file)
    assert "not compared" in capsys.readouterr().out
    assert check.check_ratios(tmp_path / "none.json", 0.1, 1)


def test_without_valgrind_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(instructions.shutil, "which", lambda *_, **__: None)
    assert check.check_instructions()
    assert "skipped: valgrind was not found" in capsys.readouterr().out
    monkeypatch.setattr(instructions, "main", lambda _: 1)
    assert not check.check_instructions()


def test_what_is_checked_is_what_make_bench_times():
    chosen = set(check.selection())
    assert chosen <= set(micro.choose())
    assert {case.op for case in chosen} == set(cases.OPS)


def test_the_command_measures_and_compares(tmp_path, monkeypatch):
    """With results of its own run, then with such as no machine reaches."""
    given = ["-k", "euler_step-forward---256tokens-batch1", "--seconds", "0.01"]
    python("-m", "benchmarks", "--results", str(tmp_path), *given)
    (file,) = tmp_path.glob("*/micro.json")
    record = json.loads(file.read_text())
    (timed,) = record["rows"]
    for name in ("median", "q1", "q3"):
        timed["seconds"]["eager"][name] *= 1000
    median = timed["seconds"]["ours"]["median"]
    timed["seconds"]["ours"] |= {"q1": median, "q3": median}
    file.write_text(json.dumps(record))
    given = f"--only ratios --against {file} --seconds 0.05".split()
    out = python("-m", "benchmarks.check", *given, status=1)
    assert "LOST: euler_step-forward---256tokens-batch1: vs eager" in out

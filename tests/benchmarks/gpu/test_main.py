"""Dry runs of `make gpu`'s commands, and what ends them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import report, results
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import build, check
from benchmarks.gpu.work import Work
from benchmarks.results import ROOT
from ecar_kernels.registry import OPS


def dry_run(folder: Path, capsys, command: str, *more: str) -> dict[str, list[dict]]:
    """The rows of each part of a command's dry run."""
    assert gpu.main([command, "--dry-run", "--results", str(folder), *more]) == 0
    printed = capsys.readouterr().out
    record = results.read(results.path(f"gpu-{command}", folder))
    assert record["runs"][0]["dry_run"] and record["runs"][0]["versions"]["torch"]
    parts = {}
    for row in record["rows"]:
        assert f"{row['part']}: {row['name']}: " in printed
        parts.setdefault(row["part"], []).append(row)
    text = report.render(record)
    assert "A dry run" in text and all(f"**{part}**" in text for part in parts)
    return parts


def rows_of(rows: list[dict], key: str) -> dict[str, dict]:
    return {row["name"]: row for row in rows if key in row}


class TestDryRuns:
    def test_check(self, tmp_path, capsys):
        parts = dry_run(tmp_path, capsys, "check")
        assert list(parts) == ["build", "accuracy", "images", "tests"]
        judged = parts["accuracy"]
        assert {row["op"] for row in judged} == set(OPS)
        # Triton's, too, where another test of this process has interpreted them.
        found = [row for row in judged if row["served"] == "cpp"]
        assert len(found) == len(OPS) * 2 * 3  # layouts, dtypes
        assert all(
            row["found"] <= row["allowed"] and row["served"] in check.KERNELS for row in judged
        )
        images = rows_of(parts["images"], "allowed")
        assert set(images) == {"E-CAR-S bfloat16", "E-CAR-S float32"}
        assert all(
            set(row["served"]) >= {"adaln_linear", "initial_noise"} for row in images.values()
        )
        (library,) = rows_of(parts["build"], "served").values()
        assert library["served"].keys() == set(OPS)

    def test_image(self, tmp_path, capsys):
        rows = dry_run(tmp_path, capsys, "image")["latency"]
        assert rows[0]["copy"] > 0
        images = list(rows_of(rows, "setting").values())
        assert [(row["batch"], row["way"]) for row in images] == [(1, "default"), (2, "plain")]
        assert all(row["of_the_floor"] > 0 and row["served"] for row in images)
        (profile,) = rows_of(rows, "kernels").values()
        assert profile["busy_seconds"] > 0 and profile["output"]

    def test_ops(self, tmp_path, capsys):
        parts = dry_run(tmp_path, capsys, "ops", "--only", "eager", "memcheck")
        assert list(parts) == ["build", "eager", "memcheck"]
        (timed,) = results.read(results.path("micro", tmp_path))["rows"]
        assert timed["op"] == "euler_step" and timed["seconds"].keys() == {"eager", "ours"}

    def test_unknown_words_are_refused(self, capsys):
        for arguments in (["chek"], ["check", "--only", "acuracy"]):
            with pytest.raises(SystemExit):
                gpu.main(arguments)
            assert f"invalid choice: '{arguments[-1]}'" in capsys.readouterr().err


def test_nothing_runs_where_the_library_is_missing(tmp_path, monkeypatch, capsys):
    """Of a machine with a GPU it is the CUDA half; the way to the stop is the same."""
    reason = "environment variable ECAR_LIBRARY: no file /no/such.so"
    monkeypatch.setattr(build._native, "why_not", lambda: reason)
    assert gpu.main(["--dry-run", "--results", str(tmp_path)]) == gpu.STOPPED
    assert f"error: make gpu-check stops here: {reason}" in capsys.readouterr().err
    (file,) = tmp_path.glob("*/*.json")
    assert [row["part"] for row in results.read(file)["rows"]] == ["build"]


def test_a_cut_loses_at_most_the_row_under_way(tmp_path):
    """The command is killed, as where a machine is taken back."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "benchmarks.gpu", "check", "--dry-run"),
            *("--results", str(tmp_path), "--only", "accuracy"),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
    )
    lines = (line for line in process.stdout if line.startswith("accuracy: "))
    printed = [next(lines).split(": ")[1] for _ in range(3)]
    process.kill()
    process.wait(30)
    rows = results.read(results.path("gpu-check", tmp_path))["rows"]
    assert [row["name"] for row in rows if row["part"] == "accuracy"][:3] == printed


def test_a_part_past_its_time_leaves_the_rest_out_and_the_others_go_on(tmp_path, monkeypatch):
    def slow(work: Work) -> None:
        assert work.begins("first", 0.1)
        work.deadline = time.time() - 1  # as if it had taken long
        assert not work.begins("second", 10)

    def broken(work: Work) -> None:
        raise ValueError("no such thing")

    def last(work: Work) -> None:
        work.add("done")

    monkeypatch.setattr(gpu, "COMMANDS", {"check": {slow: 9.0, broken: 9.0, last: 9.0}})
    monkeypatch.setattr(gpu, "PARTS", ["slow", "broken", "last"])
    monkeypatch.setattr(build, "build", lambda work: None)
    monkeypatch.setattr(Work, "left", property(lambda work: work.deadline - time.time()))
    given = ["check", "--dry-run", "--seconds", "1e6", "--results", str(tmp_path)]
    assert gpu.main(given) == 1
    skipped, failed, done = results.read(results.path("gpu-check", tmp_path))["rows"]
    assert skipped["skipped"] == "no time left: it takes about 10 s"
    assert failed["ok"] is False and "ValueError: no such thing" in failed["output"]
    assert done["name"] == "done"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == gpu.STOPPED
    assert "sees no CUDA GPU" in capsys.readouterr().err


class TestPrograms:
    def test_what_fails_says_why(self, capsys):
        work = Work("check", "tests")
        code = "import sys; print('first'); print('last'); sys.exit(3)"
        assert work.run("a program", [sys.executable, "-c", code]) == "last"
        (row,) = work.rows
        assert row["ok"] is False and row["output"] == "first\nlast\n"
        assert "first\nlast" in capsys.readouterr().out

    def test_what_takes_too_long_is_ended_with_all_that_it_started(self, tmp_path):
        work, file = Work("check", "tests", deadline=time.time() + 2), tmp_path / "file"
        assert work.run("a program", ["sh", "-c", f"(sleep 5; touch {file}) & wait"]) is None
        assert work.rows[0]["skipped"] == "cut off, no time left"
        time.sleep(4)
        assert not file.exists()

"""`make bench` works: every case runs, and a run writes a complete record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ecar_kernels

ROOT = Path(__file__).parent.parent


def python(*arguments) -> str:
    # A pytest of its own: options of the outer one may not fit it, and pytest-benchmark measures
    # nothing where it sees that it is in a worker of xdist.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_case_runs():
    served = sum(row.available for row in ecar_kernels.backends())
    options = ("-q", "-p", "no:cacheprovider", "--benchmark-disable")
    out = python("-m", "pytest", *options, "benchmarks")
    assert f"{3 * served + 1} passed" in out


def test_a_run_writes_its_record(tmp_path):
    chosen = ("-k", "euler_step and reference and 16tokens", "-p", "no:cacheprovider")
    out = python("-m", "benchmarks", "--results", str(tmp_path), *chosen)
    (file,) = tmp_path.glob("*/*.json")
    assert f"wrote {file}" in out
    record = json.loads(file.read_text("utf-8"))
    environment = record["environment"]
    assert {"device", "threads", "versions", "load_before", "date"} <= environment.keys()
    names = {(row["op"], row["backend"], row["n"]) for row in record["benchmarks"]}
    assert names == {("euler_step", "reference", 16)}
    for row in record["benchmarks"]:
        seconds = row["seconds"]
        assert 0 < seconds["min"] <= seconds["q1"] <= seconds["median"] <= seconds["q3"]
        assert row["bytes"] > 0

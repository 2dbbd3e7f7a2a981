"""Dry runs of `make gpu`'s commands, and what ends them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import cases, results
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import check
from benchmarks.results import ROOT
from ecar_kernels.registry import OPS

COMPILING = {
    "stage_attention-backward-S-16tokens-batch1, compiled",
    "adaln-forward-S-16tokens-batch1, compiled",
}


def dry_run(command: str, folder: Path, capsys) -> dict:
    """The parts of a command's dry run, all done."""
    assert gpu.main([command, "--dry-run", "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert {file.name for file in folder.iterdir()} == {f"gpu-{command}.json", f"gpu-{command}.md"}
    record = json.loads((folder / f"gpu-{command}.json").read_text())
    assert (
        record["environment"]["dry_run"]
        and "A dry run" in (folder / f"gpu-{command}.md").read_text()
    )
    assert (
        record["environment"]["gpu"]["name"] == "none"
        and record["environment"]["versions"]["torch"]
    )
    assert list(record["parts"]) == list(gpu.COMMANDS[command])
    assert {part["status"] for part in record["parts"].values()} == {"done"}
    for name, part in record["parts"].items():
        for row in part["rows"]:
            assert f"{name}: {row['name']}: " in printed
    return record["parts"]


def rows_of(part: dict, key: str) -> dict[str, dict]:
    return {row["name"]: row for row in part["rows"] if key in row}


class TestDryRuns:
    def test_check(self, tmp_path, capsys):
        parts = dry_run("check", tmp_path, capsys)
        judged = parts["accuracy"]["rows"]
        assert {row["op"] for row in judged} == set(OPS)
        assert len(judged) == len(OPS) * 2 * 3  # layouts, dtypes; the CPU has C++ alone
        assert all(
            row["found"] <= row["allowed"] and row["served"] in check.KERNELS for row in judged
        )
        images = rows_of(parts["images"], "allowed")
        assert set(images) == {"E-CAR-S bfloat16", "E-CAR-S float32"}
        assert all(
            set(row["served"]) >= {"adaln_linear", "initial_noise"} for row in images.values()
        )
        (backends,) = rows_of(parts["build"], "served").values()
        assert backends["served"].keys() == set(OPS)

    def test_image(self, tmp_path, capsys):
        parts = dry_run("image", tmp_path, capsys)
        assert set(rows_of(parts["images"], "unit")) == {
            "copy",
            "launch",
            "bfloat16",
            "tf32",
            "float32",
        }
        images = list(rows_of(parts["images"], "setting").values())
        assert [(row["batch"], row["way"]) for row in images] == [(1, "default"), (2, "plain")]
        assert all(row["fraction"] > 0 and row["served"] for row in images)
        (profile,) = rows_of(parts["images"], "kernels").values()
        assert 0 < profile["busy"] <= profile["span"] and profile["output"]

    def test_ops(self, tmp_path, capsys):
        parts = dry_run("ops", tmp_path, capsys)
        timed = [
            *rows_of(parts["attention"], "group").values(),
            *rows_of(parts["others"], "group").values(),
        ]
        assert {row["op"] for row in timed} == set(OPS)
        assert all(row["served"] in check.KERNELS and row["floor"] > 0 for row in timed)
        assert all(
            row["ways"]["reference"]["median"] > 0 for row in timed if row["name"] not in COMPILING
        )
        assert {row["name"] for row in timed} >= COMPILING
        assert cases.VAR in {row["size"] for row in timed}
        whole = rows_of(parts["attention"], "group")["stage_attention-backward-S-16tokens-batch1"]
        assert whole["ways"]["SDPA math"]["median"] > 0
        assert whole["failed"]["SDPA cudnn"] and whole["failed"]["flash-attn"]
        compiled = {row["name"]: row for row in timed if row["name"] in COMPILING}
        flex = compiled["stage_attention-backward-S-16tokens-batch1, compiled"]
        assert "FlexAttention does not support backward" in flex["failed"]["FlexAttention"]
        assert parts["memcheck"]["rows"][0]["name"] == "memcheck"

    def test_unknown_words_are_refused(self, capsys):
        for arguments in (["chek"], ["check", "--only", "acuracy"]):
            with pytest.raises(SystemExit):
                gpu.main(arguments)
            assert f"invalid choice: '{arguments[-1]}'" in capsys.readouterr().err


def test_nothing_runs_where_the_library_is_missing(tmp_path, monkeypatch, capsys):
    """Of a machine with a GPU it is the CUDA half; the way to the stop is the same."""
    monkeypatch.setenv("ECAR_LIBRARY", "/no/such.so")
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == gpu.STOPPED
    assert (
        "error: make gpu-check stops here: environment variable ECAR_LIBRARY: no file /no/such.so"
    ) in capsys.readouterr().err
    assert [file.name for file in tmp_path.glob("*.json")] == ["gpu-check.json"]
    assert list(json.loads((tmp_path / "gpu-check.json").read_text())["parts"]) == ["build"]


RECORD = {"kind": "gpu", "environment": {"gpu": {"name": "none"}, "dry_run": True}}


def options(*given: str, **more: object) -> object:
    return gpu.argparse.Namespace(dry=True, carried=None, words=[], given=given, **more)


def test_a_cut_loses_at_most_the_row_under_way(tmp_path):
    """The whole command is killed, as where a machine is taken back."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "check",
            "--dry-run",
            "--output",
            str(tmp_path),
            "--only",
            "accuracy",
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    printed = []
    for line in process.stdout:
        if line.startswith("accuracy: "):
            printed.append(line.split(": ")[1])
        if len(printed) == 3:
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    part = results.read(tmp_path / "gpu-check.json")["parts"]["accuracy"]
    assert [row["name"] for row in part["rows"]][:3] == printed
    assert part["status"] == "under way"


def test_a_part_past_its_time_is_ended_with_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    record, file = RECORD | {"parts": {}}, tmp_path / "gpu-check.json"
    begin = time.time()
    found = gpu._process("check", "accuracy", file, record, 0.5, options("--dry-run"))
    assert found["status"] == "cut off after 0 s" and time.time() - begin < 60
    assert results.read(file)["parts"] == {"accuracy": found}
    assert "cut off after 0 s" in file.with_suffix(".md").read_text()


def test_a_part_that_fails_says_why_and_the_others_go_on(tmp_path, monkeypatch):
    real = gpu._process

    def without_a_gpu(command, name, file, record, seconds, given):  # images fail at once
        given.given = [] if name == "images" else ["--dry-run"]
        return real(command, name, file, record, seconds, given)

    monkeypatch.setattr(gpu, "COMMANDS", {"check": {"images": 100.0, "tests": 100.0}})
    monkeypatch.setattr(gpu, "_process", without_a_gpu)
    given = options(output=tmp_path, only=gpu.PARTS)
    assert gpu._command("check", time.time() + 300, given) == 1
    parts = results.read(tmp_path / "gpu-check.json")["parts"]
    assert parts["images"]["status"] == "failed with 1"
    assert "Traceback" in parts["images"]["output"]
    assert "Traceback" in (tmp_path / "gpu-check.md").read_text()
    assert parts["tests"]["status"] == "done"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == gpu.STOPPED
    assert "sees no CUDA GPU" in capsys.readouterr().err

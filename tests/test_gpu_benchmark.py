"""`make gpu` on a machine without a GPU: a dry run of all its parts, and the roofline's sums."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cases, roofline
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import end_to_end, report
from benchmarks.gpu.checks import _counts, suites
from ecar.config import ECARConfig
from ecar.info import count_multiply_adds
from ecar_kernels.costs import Rates

ROOT = Path(__file__).parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess:
    # Without Triton's interpreter, which is asked for by the tests and slow.
    environment = {k: v for k, v in os.environ.items() if k not in ("OUT", "TRITON_INTERPRET")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=400)


def test_a_dry_run_goes_through_every_part(tmp_path):
    done = python("-m", "benchmarks.gpu", "--dry-run", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["environment"]["dry_run"]
    parts = record["parts"]
    assert list(parts) == list(gpu.PARTS)
    assert {part["status"] for part in parts.values()} == {"done"}
    assert {row["name"] for row in parts["rates"]["rows"]} == {
        "copy", "launch", "bfloat16", "tf32", "float32"}
    images = [row for row in parts["end_to_end"]["rows"] if "graphs" in row]
    assert [(row["batch"], row["guided"]) for row in images] == [(1, False), (2, True)]
    assert all(row["fraction"] > 0 for row in images)
    micro = parts["micro"]["rows"]
    assert {row["op"] for row in micro} >= {"adaln", "stage_attention", "euler_step"}
    assert all(row["variants"]["reference"]["median"] > 0 for row in micro
               if row["group"] != "compiled")
    trained = [row for row in micro if row["group"] == "forward and backward"]
    assert trained and trained[0]["variants"]["SDPA math"]["median"] > 0
    assert "FlexAttention does not support backward" in trained[0]["failed"]["FlexAttention"]
    assert cases.VAR in {row["size"] for row in micro}
    table = (tmp_path / "gpu.md").read_text()
    assert "## sanitize" in table and "A dry run" in table
    assert {file.name for file in tmp_path.iterdir()} == {"gpu.json", "gpu.md"}


def test_a_part_that_is_cut_off_leaves_its_rows(tmp_path, monkeypatch):
    """Time for torch to be imported and not for all rows."""
    monkeypatch.setattr(gpu, "MARGIN", 0)
    found = gpu._process("micro", 1.0, {}, True)
    assert found["status"] == "cut off after 1 s"
    assert report.render({"environment": {"gpu": {}, "dry_run": True}, "parts": {"micro": found}})


def test_a_part_that_fails_says_why_and_the_others_go_on(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = gpu._process("micro", 100.0, {}, False)  # there is no GPU: it fails at once
    assert found["status"] == "failed with status 1"
    text = report.render({"environment": {"gpu": {}, "dry_run": False}, "parts": {"micro": found}})
    assert "Traceback" in text


def test_without_a_gpu_it_says_so():
    done = python("-m", "benchmarks.gpu")
    assert done.returncode == 2
    assert "sees no CUDA GPU" in done.stderr


def test_rows_are_warmed(capsys):
    end_to_end.warm(end_to_end.DRY_ROWS, dry=True)
    assert capsys.readouterr().out.count("warm: ") == 2


def test_only_files_with_gpu_tests_are_collected():
    """Others may import what a machine with a GPU does not have."""
    chosen = suites()["marked gpu"]
    assert chosen[:2] == ["-m", "gpu"]
    assert "tests/ecar/test_graphs_gpu.py" in chosen
    assert "tests/ecar/test_pipeline.py" not in chosen


def test_what_the_sanitizers_watch_runs():
    done = python("-m", "benchmarks.gpu.small", "cpu")
    assert done.returncode == 0, done.stderr
    assert "adaln native torch.bfloat16" in done.stdout


def test_outcomes_are_read_from_the_tests_report(tmp_path):
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_a(): pass\n"
                                         "def test_b(): assert 0\ndef test_c(): pytest.skip()\n")
    report = tmp_path / "report.xml"
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--junitxml={report}",
           f"--rootdir={tmp_path}", str(tmp_path / "test_it.py"))
    assert _counts(report) == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1,
                               "failed": ["test_b"]}
    assert _counts(tmp_path / "none.xml") == {}


class TestRoofline:
    @pytest.mark.parametrize("size", ["S", "B", "L", "digits", "mnist"])
    def test_multiply_adds_are_the_samplers(self, size):
        config = ECARConfig.preset(size)
        parts = roofline.Roofline(config, steps=25).parts()
        counted = count_multiply_adds(config, steps=25)
        for part, name in (("AR", "ar"), ("modulation", "modulation"), ("flow", "flow")):
            assert parts[part].multiply_adds == sum(getattr(stage, name) for stage in counted)

    def test_weights_are_read_once_a_call(self):
        """A step of one block more reads that block's weights more, and its modulation."""
        def step(blocks):
            config = ECARConfig.preset("S", flow_blocks=blocks)
            return roofline.Roofline(config, itemsize=4).step(3)

        d, tokens = 768, 256
        more = step(3) + step(2) * -1
        assert more.weights == 4 * (12 * d * d + 9 * d)
        assert more.modulation == 4 * 6 * (tokens * d + d)
        assert more.launches == 5

    def test_guided_images_and_batches_share_their_weights(self):
        one = roofline.Roofline(ECARConfig.preset("B")).total()
        eight = roofline.Roofline(ECARConfig.preset("B"), batch=8).total()
        guided = roofline.Roofline(ECARConfig.preset("B"), guided=True).total()
        assert one.weights == pytest.approx(eight.weights, rel=1e-3)
        assert guided.multiply_adds == pytest.approx(2 * one.multiply_adds, rel=0.01)
        assert one.launches == eight.launches == guided.launches

    def test_the_floor_is_the_longest_of_three(self):
        work = roofline.Work(weights=600, modulation=300, activations=100, multiply_adds=4000,
                             launches=7)
        found = roofline.floor(work, Rates(100.0, 1000.0), 0.5)
        assert (found.memory, found.arithmetic, found.launches) == (10.0, 4.0, 3.5)
        assert found.seconds == 10.0

    def test_the_command_prints_a_table(self, capsys):
        given = ["--sizes", "digits", "--bytes-per-second", "1e9", "--multiply-adds-per-second",
                 "1e9", "--launch-seconds", "1e-6"]
        assert roofline.main(given) == 0
        assert "| digits | all |" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            roofline.main(["--bytes-per-second", "1e9"])

"""`make gpu` on a machine without a GPU: dry runs of its commands, and the roofline's sums."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import cases, results, roofline
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import calls, carry, checks, image, report, work
from ecar.config import ECARConfig
from ecar.info import count_multiply_adds
from ecar_kernels import _triton
from ecar_kernels.costs import Rates
from ecar_kernels.registry import OPS

ROOT = Path(__file__).parent.parent
COMPILING = {
    "stage_attention-backward-S-16tokens-batch1, compiled",
    "adaln-forward-S-16tokens-batch1, compiled",
}


def python(*arguments: str, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | more,
        text=True,
        capture_output=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """Of the processes that this one starts, too."""
    for name in ("OUT", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


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
    assert list(record["parts"]) == list(gpu.COMMANDS[command])
    assert {part["status"] for part in record["parts"].values()} == {"done"}
    for name, part in record["parts"].items():
        for row in part["rows"]:
            assert row["on"].startswith("none, torch ")
            assert f"{name}: {row['name']}: " in printed
    return record["parts"]


def rows_of(part: dict, key: str) -> dict[str, dict]:
    return {row["name"]: row for row in part["rows"] if key in row}


class TestDryRuns:
    def test_check(self, tmp_path, capsys):
        parts = dry_run("check", tmp_path, capsys)
        judged = parts["accuracy"]["rows"]
        assert {row["op"] for row in judged} == set(OPS)
        assert len(judged) == len(OPS) * len(calls.SMALL) * 3  # dtypes; the CPU has C++ alone
        assert all(row["found"] <= row["allowed"] and row["served"] == "native" for row in judged)
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
        assert 0 < profile["busy"] <= profile["span"] and profile["slowest"]

    def test_ops(self, tmp_path, capsys):
        parts = dry_run("ops", tmp_path, capsys)
        timed = [
            *rows_of(parts["attention"], "group").values(),
            *rows_of(parts["others"], "group").values(),
        ]
        assert {row["op"] for row in timed} == set(OPS)
        assert all(row["served"] == "native" and row["floor"] > 0 for row in timed)
        assert all(
            row["variants"]["reference"]["median"] > 0
            for row in timed
            if row["name"] not in COMPILING
        )
        assert {row["name"] for row in timed} >= COMPILING
        assert cases.VAR in {row["size"] for row in timed}
        whole = rows_of(parts["attention"], "group")["stage_attention-backward-S-16tokens-batch1"]
        assert whole["variants"]["SDPA math"]["median"] > 0
        assert whole["failed"]["SDPA cudnn"] and whole["failed"]["flash-attn"]
        compiled = {row["name"]: row for row in timed if row["name"] in COMPILING}
        flex = compiled["stage_attention-backward-S-16tokens-batch1, compiled"]
        assert "FlexAttention does not support backward" in flex["failed"]["FlexAttention"]
        assert parts["memcheck"]["rows"][0]["name"] == "memcheck"

    def test_unknown_words_are_refused(self, capsys):
        for arguments in (["chek"], ["check", "--only", "acuracy"]):
            with pytest.raises(SystemExit):
                gpu.main(arguments)
            assert f"got '{arguments[-1]}'" in capsys.readouterr().err


def test_nothing_runs_where_the_library_is_missing(tmp_path, monkeypatch, capsys):
    """Of a machine with a GPU it is the CUDA half; the way to the stop is the same."""
    monkeypatch.setenv("ECAR_LIBRARY", "/no/such.so")
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == gpu.STOPPED
    assert (
        "error: make gpu-check stops here: environment variable ECAR_LIBRARY: no file /no/such.so"
    ) in capsys.readouterr().err
    assert [file.name for file in tmp_path.glob("*.json")] == ["gpu-check.json"]
    assert list(json.loads((tmp_path / "gpu-check.json").read_text())["parts"]) == ["build"]


def test_a_gpu_without_the_cuda_half_stops_it(tmp_path, monkeypatch):
    """What is carried does not fit: a row says why, the build is tried, and what loads counts."""
    ran = []
    monkeypatch.setattr(checks._native, "why_not_cuda", lambda: "the CUDA half is not built")
    monkeypatch.setattr(checks, "run", lambda work, argv, *more: ran.append(argv) or (0, ""))
    monkeypatch.setattr(carry, "architecture", lambda dry: 90)
    found = work.Work("check", "build", carried=tmp_path)
    checks.build(found)
    carried, built, half = found.rows
    assert "manifest.json" in carried["why_not"]
    assert built["ok"] and ran[0][1:] == ["setup.py", "build_ext", "--inplace"]
    assert half["name"] == "CUDA half"
    assert (half["ok"], half["stop"]) == (False, "the CUDA half is not built")
    # A library of an earlier build is no way out of a build that fails.
    monkeypatch.setattr(checks._native, "why_not_cuda", lambda: None)
    monkeypatch.setattr(checks, "run", lambda *arguments: (1, "nvcc\nerror: x\n"))
    checks.build(found := work.Work("check", "build"))
    assert found.rows[-1]["stop"] == "the build failed: error: x"


def begun(tmp_path: Path, command: str = "check") -> Path:
    file = tmp_path / f"gpu-{command}.json"
    results.write(
        file,
        "gpu",
        {"gpu": {"name": "none"}, "dry_run": True, "versions": {}},
        command=command,
        parts={},
    )
    return file


def options(**given: object) -> object:
    return gpu.argparse.Namespace(dry_run=True, carried=None, words=[], **given)


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
    monkeypatch.setattr(gpu, "COMMANDS", {"check": {"tests": ("checks:tests", 1.0)}})
    begin = time.time()
    found = gpu._process("check", "tests", begun(tmp_path), 0.5, options())
    assert found["status"] == "cut off after 0 s" and time.time() - begin < 60
    assert report.render({"environment": {"gpu": {}, "dry_run": True}, "parts": {"tests": found}})


def test_a_part_that_fails_says_why_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(
        gpu.COMMANDS,
        "check",
        {"images": ("checks:images", 100.0), "tests": ("checks:tests", 100.0)},
    )
    real = gpu._process

    def without_a_gpu(command, name, file, seconds, given):  # the first part fails at once
        given.dry_run = name != "images"
        return real(command, name, file, seconds, given)

    monkeypatch.setattr(gpu, "_process", without_a_gpu)
    assert gpu._command("check", time.time() + 300, options(output=tmp_path, only=None)) == 1
    parts = results.read(tmp_path / "gpu-check.json")["parts"]
    assert parts["images"]["status"] == "failed with status 1"
    assert "Traceback" in parts["images"]["output"]
    assert "Traceback" in (tmp_path / "gpu-check.md").read_text()
    assert parts["tests"]["status"] == "done"


def test_words_choose_rows():
    found = work.Work("check", "accuracy", dry=True, words=("euler_step", "plain"))
    checks.accuracy(found)
    assert [row["op"] for row in found.rows] == ["euler_step"] * 3


def test_no_row_is_begun_that_cannot_end(capsys):
    late = work.Work("image", "images", deadline=time.time() + 5)
    assert late.begins("a", 1) and not late.begins("b", 10)
    assert late.rows == [{"name": "b", "skipped": "no time left: it takes about 10 s", "on": ""}]
    assert "images: b: no time left" in capsys.readouterr().out


def test_a_wrong_op_is_a_row_that_fails(monkeypatch):
    real = calls.calls

    def wrong(*arguments):
        for call in real(*arguments):
            if call.op == "euler_step":
                yield calls.Call(
                    call.op,
                    call.backend,
                    call.dtype,
                    call.layout,
                    lambda f=call.function, **given: f(**given) + 1,
                    call.given,
                )

    monkeypatch.setattr(calls, "calls", wrong)
    found = work.Work("check", "accuracy", dry=True)
    checks.accuracy(found)
    assert [row["ok"] for row in found.rows] == [False] * 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == gpu.STOPPED
    assert "sees no CUDA GPU" in capsys.readouterr().err


def test_rows_are_those_asked_for():
    """S, B and L in bfloat16 and TF32 at batch 1, 8 and 64, as a user has them and plain."""
    rows = {(row.size, row.numbers, row.batch, row.way) for row in image.ROWS}
    assert rows >= {
        (size, numbers, batch, way)
        for size in "SBL"
        for batch in (1, 8, 64)
        for numbers in ("bfloat16", "tf32")
        for way in ("default", "plain")
    }
    assert len(rows) == len(image.ROWS)
    assert image.ACCELERATED


def test_only_files_with_gpu_tests_are_collected():
    """Others may import what a machine with a GPU does not have; the sampler's come first."""
    chosen = checks.suites()["marked gpu"]
    assert chosen[:3] == ["-m", "gpu", "tests/ecar/sampling/test_graph_gpu.py"]
    assert "tests/ecar/test_pipeline.py" not in chosen
    assert {Path(name).stem for name in chosen[2:]} >= set(checks.FIRST_TESTS)


def test_what_memcheck_watches_runs():
    assert "adaln native bfloat16 views" in python("-m", "benchmarks.gpu.calls", "cpu")


def test_tests_are_named_as_they_end(tmp_path, capsys):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip()\n"
    )
    found = work.Work("check", "tests")
    checks.run_tests(
        found, "mine", ["-c", os.devnull, f"--rootdir={tmp_path}", str(tmp_path / "test_it.py")]
    )
    failed, suite = found.rows
    assert failed["name"].endswith("test_b") and failed["ok"] is False
    assert suite["counts"] == {"passed": 1, "failed": 1, "skipped": 1} and suite["ok"] is False
    assert "assert 0" in suite["output"]
    assert "test_a: passed" in capsys.readouterr().out


NEEDS = {
    "system": "Linux x86_64",
    "architecture": 90,
    "sources": "abc",
    "glibc": "2.36",
    "torch": "2.10",
}
HERE = NEEDS | {"glibc": "2.39", "torch": "2.11.0+cu130"}


class TestCarry:
    def test_what_fits(self):
        assert carry.misfit(NEEDS, HERE) is None

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("system", "Linux aarch64"),
            ("architecture", 100),
            ("sources", "abd"),
            ("glibc", "2.35"),
            ("torch", "2.9.1"),
            ("glibc", ""),
        ],
    )
    def test_what_does_not_says_why(self, name, value):
        reason = carry.misfit(NEEDS, HERE | {name: value})
        assert reason.startswith(f"it is for {name} ") and reason.endswith(f"here is {value}")

    def test_without_anything_carried_things_are_built(self, tmp_path):
        assert carry.MANIFEST in carry.install_library(tmp_path, dry=True)
        (tmp_path / carry.MANIFEST).write_text(json.dumps({"library": carry.library_facts(90)}))
        assert carry.install_library(tmp_path, dry=True) is None
        assert "expected an object with 'kernels'" in carry.install_kernels(tmp_path, 90)[0]

    def test_a_library_that_fits_takes_the_place_of_what_is_there(self, tmp_path, monkeypatch):
        package, folder = tmp_path / "ecar_kernels", tmp_path / "carried"
        package.mkdir()
        (folder / "library").mkdir(parents=True)
        for name in carry.LIBRARY:
            (folder / "library" / name).write_text(f"carried {name}")
        (package / carry.LIBRARY[1]).write_text("old")
        (package / checks._native.WHY_NOT_BUILT).write_text("no compiler")
        monkeypatch.setattr(checks._native, "FOLDER", package)
        monkeypatch.setattr(carry, "architecture", lambda dry: 90)
        for architecture in (100, 90):  # a misfit leaves all as it was
            (folder / carry.MANIFEST).write_text(
                json.dumps({"library": carry.library_facts(architecture)})
            )
            reason = carry.install_library(folder)
            assert (reason is None) == (architecture == 90)
            assert (package / carry.LIBRARY[1]).read_text() == (
                "old" if reason else f"carried {carry.LIBRARY[1]}"
            )
        assert {file.name for file in package.iterdir()} == set(carry.LIBRARY)

    @pytest.mark.skipif(_triton._not_installed(), reason="Triton is not installed")
    def test_a_kernel_is_packed_unpacked_and_found(self, tmp_path, monkeypatch):
        """Compiled for a GPU that is not there, then launched by another process from the cache."""

        def warm(cache: Path) -> str:
            said = python(
                "-m",
                "benchmarks.gpu.carry",
                "warm",
                "check",
                "--fake",
                "90",
                "-k",
                "gated_residual triton",
                "bfloat16 plain",
                TRITON_CACHE_DIR=str(cache),
            )
            return said.splitlines()[-1]

        said = warm(tmp_path / "made")
        assert ", 0 found" in said and ": 0 kernels compiled" not in said
        (tmp_path / "carried").mkdir()
        packed = tmp_path / "carried" / carry.KERNELS
        assert carry.archive(tmp_path / "made", packed) > 0
        shutil.rmtree(tmp_path / "made")
        with monkeypatch.context() as patch:
            patch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
            assert carry.unpack(packed) > 0
        assert ": 0 kernels compiled, " in warm(tmp_path / "other")
        # The same for another chip, Triton or sources is refused.
        for name, value in (
            ("architecture", 100),
            ("triton", "3.0.0"),
            ("sources", "other"),
            ("compiler", "other"),
            ("python", "3.9"),
        ):
            (tmp_path / "carried" / carry.MANIFEST).write_text(
                json.dumps({"kernels": carry.kernel_facts(90) | {name: value}})
            )
            assert carry.install_kernels(tmp_path / "carried", 90)[0].startswith(
                f"it is for {name} {value}, here is"
            )


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
        work = roofline.Work(
            weights=600, modulation=300, activations=100, multiply_adds=4000, launches=7
        )
        found = roofline.floor(work, Rates(100.0, 1000.0), 0.5)
        assert (found.memory, found.arithmetic, found.launches) == (10.0, 4.0, 3.5)
        assert found.seconds == 10.0

"""What is carried to a machine with a GPU fits there, or says why not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import carry, checks
from benchmarks.results import ROOT
from ecar_kernels import _triton


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

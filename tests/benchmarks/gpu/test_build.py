"""What is carried to a machine with a GPU fits there, or says why not."""

import json
import shutil

import pytest

from benchmarks.gpu import build
from benchmarks.gpu.work import Work
from ecar_kernels import _triton
from tests.benchmarks.support import python

NEEDS = {"system": "Linux x86_64", "architecture": 90, "sources": "abc", "glibc": "2.36"}
NEEDS |= {"torch": "2.10"}
HERE = NEEDS | {"glibc": "2.39", "torch": "2.11.0+cu130"}


def carried(folder, **needs):
    """A part of a command to whose machine a folder is carried."""
    (folder / build.MANIFEST).write_text(json.dumps(needs))
    return Work("check", "build", carried=folder)


def test_what_fits():
    assert build.misfit(NEEDS, HERE) is None


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
def test_what_does_not_says_why(name, value):
    reason = build.misfit(NEEDS, HERE | {name: value})
    assert reason.startswith(f"it is for {name} ") and reason.endswith(f"here is {value}")


def test_without_anything_carried_things_are_built(tmp_path):
    assert not build.install("library", Work("check", "build"), 90)
    work = Work("check", "build", carried=tmp_path, dry=True)
    assert not build.install("library", work, 90)
    assert build.MANIFEST in work.rows[-1]["why_not"]
    carried(tmp_path, library=build.facts("library", 90))
    assert build.install("library", work, 90)
    assert not build.install("kernels", work, 90)
    assert "'kernels'" in work.rows[-1]["why_not"]


def test_a_library_that_fits_takes_the_place_of_what_is_there(tmp_path, monkeypatch):
    package, folder = tmp_path / "ecar_kernels", tmp_path / "carried"
    package.mkdir()
    (folder / "library").mkdir(parents=True)
    for name in build.LIBRARY:
        (folder / "library" / name).write_text(f"carried {name}")
    (package / build.LIBRARY[1]).write_text("old")
    (package / build._native.WHY_NOT_BUILT).write_text("no compiler")
    monkeypatch.setattr(build._native, "FOLDER", package)
    for architecture in (100, 90):  # a misfit leaves all as it was
        work = carried(folder, library=build.facts("library", architecture))
        fits = build.install("library", work, 90)
        assert fits == (architecture == 90)
        found = (package / build.LIBRARY[1]).read_text()
        assert found == (f"carried {build.LIBRARY[1]}" if fits else "old")
    assert {file.name for file in package.iterdir()} == set(build.LIBRARY)


@pytest.mark.skipif(_triton._not_installed(), reason="Triton is not installed")
def test_a_kernel_is_packed_unpacked_and_found(tmp_path, monkeypatch):
    """Compiled for a GPU that is not there, then launched by another process from the cache."""

    def warm(cache, command, *words) -> str:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
        said = python("-m", "benchmarks.gpu.build", command, "--architecture", "90", "-k", *words)
        return said.splitlines()[-1]

    rows = ("check", "gated_residual triton", "bfloat16 small plain")
    for chosen in (rows, ("ops", "linear_gated_residual-forward-S-16tokens-batch1")):
        said = warm(tmp_path / "made", *chosen)
        assert ", 0 found" in said and ": 0 kernels compiled" not in said
    build.archive(tmp_path / "made", tmp_path)
    shutil.rmtree(tmp_path / "made")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    facts = build.facts("kernels", 90)
    # For another chip, Triton or sources they are refused.
    for name, value in (
        ("architecture", 100),
        ("triton", "3.0.0"),
        ("sources", "other"),
        ("compiler", "other"),
        ("python", "3.9"),
    ):
        work = carried(tmp_path, kernels=facts | {name: value})
        assert not build.install("kernels", work, 90)
        assert work.rows[-1]["why_not"].startswith(f"it is for {name} {value}, here is")
    assert build.install("kernels", carried(tmp_path, kernels=facts), 90)
    assert ": 0 kernels compiled, " in warm(tmp_path / "other", *rows)

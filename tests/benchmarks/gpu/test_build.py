"""What is carried to a machine with a GPU fits there, or says why not."""

import json
import shutil

import pytest

from benchmarks.gpu import build
from benchmarks.gpu.work import Work
from ecar_kernels import _triton
from tests.benchmarks.support import python


def carried(folder, **needs):
    """A command to whose machine a folder is carried."""
    (folder / build.MANIFEST).write_text(json.dumps(needs))
    return Work("check", "build", carried=folder)


def test_without_anything_carried_things_are_built(tmp_path):
    assert not build.install(Work("check", "build"), 90)
    work = Work("check", "build", carried=tmp_path, dry=True)
    assert not build.install(work, 90)
    assert build.MANIFEST in work.rows[-1]["why_not"]
    carried(tmp_path, **build.facts(90))
    assert build.install(work, 90)


@pytest.mark.parametrize(
    ("name", "value", "loads"),
    [
        ("system", "Linux aarch64", True),
        ("architecture", 100, True),
        ("sources", "abd", True),
        ("sources", None, False),
        ("sources", None, True),
    ],
)
def test_a_library_that_fits_takes_the_place_of_what_is_there(
    tmp_path, monkeypatch, name, value, loads
):
    package, folder = tmp_path / "ecar_kernels", tmp_path / "carried"
    package.mkdir()
    (folder / "library").mkdir(parents=True)
    for library in build.LIBRARY:
        (folder / "library" / library).write_text(f"carried {library}")
    (package / build.LIBRARY[1]).write_text("old")
    (package / build._native.WHY_NOT_BUILT).write_text("no compiler")
    monkeypatch.setattr(build._native, "FOLDER", package)
    monkeypatch.setattr(build, "unpack", lambda folder: None)
    monkeypatch.setattr(build, "LOADS", f"print({'loads' if loads else 'undefined symbol: x'!r})")
    work = carried(folder, **build.facts(90) | ({name: value} if value else {}))
    fits = value is None and loads
    assert build.install(work, 90) == fits
    reason = work.rows[-1]["why_not"]
    if value:  # a misfit leaves all as it was
        assert reason.startswith(f"it is for {name} {value}, here is ")
        assert (package / build.LIBRARY[1]).read_text() == "old"
    else:
        assert reason is None if loads else "undefined symbol: x" in reason
        assert {file.name for file in package.iterdir()} == set(build.LIBRARY)


@pytest.mark.skipif(_triton._not_installed(), reason="Triton is not installed")
def test_a_kernel_is_packed_unpacked_and_found(tmp_path, monkeypatch):
    """Compiled for a GPU that is not there, then launched by another process from the cache."""

    def warm(cache, command, *words) -> str:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
        said = python("-m", "benchmarks.gpu.build", command, "--architecture", "90", "-k", *words)
        return said.splitlines()[-1]

    rows = ("check", "gated_residual triton", "bfloat16 small plain")
    for chosen in (rows, ("ops", "linear_gated_residual-forward-S-16tokens-batch1-")):
        said = warm(tmp_path / "made", *chosen)
        assert ", 0 found" in said and ": 0 kernels compiled" not in said
    build.archive(tmp_path / "made", tmp_path)
    shutil.rmtree(tmp_path / "made")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    build.unpack(tmp_path)
    assert ": 0 kernels compiled, " in warm(tmp_path / "other", *rows)

"""Runs the tests that have a GPU that is not there, each file in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "tests" / "fake_gpu").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_a_gpu_that_is_not_there(file, tmp_path, seed):
    """Its kernels are compiled into a folder of its own, and no real GPU is seen."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_XDIST", "PYTEST_CURRENT"))
    }
    environment |= {
        "ECAR_FAKE_GPU": "1",
        "TRITON_INTERPRET": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "ECAR_TUNED": str(tmp_path / "tuned"),
        "ECAR_TEST_SEED": str(seed),
    }
    for name in ("ECAR_BACKEND", "PYTEST_ADDOPTS"):  # those of the run around it, not of this one
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-2000:]}"

"""Runs a benchmark's command as a user does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def python(*arguments: str, status: int = 0, timeout: float = 300) -> str:
    """Its output; fails where it ends with another status."""
    # A pytest of its own: options of the outer one may not fit it, and pytest-benchmark measures
    # nothing where it sees that it is in a worker of xdist.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    # The benchmarks time what `auto` takes; interpreted kernels are no part of it.
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stdout + done.stderr

"""Runs a benchmark's command as a user does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def environment() -> dict[str, str]:
    """Without pytest's options, and with kernels as `auto` takes them, not interpreted."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    found.pop("TRITON_INTERPRET", None)
    return found


def python(*arguments: str, status: int = 0, timeout: float = 300) -> str:
    """Its output; fails if it ends with another status."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stdout + done.stderr

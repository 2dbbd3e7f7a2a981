"""Programs that a command runs: their output as it comes, and an end to all that they started."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence

from benchmarks.gpu.work import Work
from benchmarks.results import ROOT


def run(
    work: Work,
    command: list[str],
    environment: dict[str, str] | None = None,
    line: Callable[[str], None] | None = None,
) -> tuple[int, str]:
    """Exit status and output, each line given to `line` as it comes.

    A command cut off at the part's deadline has status 124. A dry run runs none.
    """
    if work.dry:
        return 0, f"dry run, not run: {' '.join(command)}"
    lines: list[str] = []

    def follow(text: str) -> None:
        lines.append(text)
        if line is not None:
            line(text.rstrip())

    code = follow_process(command, max(work.left, 1), follow, environment)
    return (124 if code is None else code), "".join(lines)


def follow_process(
    command: Sequence[str],
    seconds: float,
    line: Callable[[str], None],
    environment: dict[str, str] | None = None,
) -> int | None:
    """The exit status, each line of output given to `line`; None if it was ended, with all that
    it had started, for it was not done in time."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {}), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def read() -> None:
        for text in process.stdout:
            line(text)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        return process.wait(None if seconds == float("inf") else seconds)
    except subprocess.TimeoutExpired:
        end(process)
        return None
    except BaseException:
        end(process)
        raise
    finally:
        reader.join(1)


def end(process: subprocess.Popen) -> None:
    """By SIGTERM first, so that it can end what it has started in sessions of their own."""
    for signal_number, seconds in ((signal.SIGTERM, 2), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, signal_number)
            process.wait(seconds)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue

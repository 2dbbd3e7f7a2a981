"""All threads next to one on a busy machine: what is measured, shown and judged."""

import contextlib
import os
import subprocess

import pytest

from benchmarks import busy, check


def row(all_threads, one_thread, loops=2):
    seconds = {"all threads": all_threads, "one thread": one_thread}
    return {"waits": "ecar's", "busy": loops, "seconds": seconds}


def loops():
    """Busy loops that are this process's children."""
    command = ["pgrep", "-P", str(os.getpid()), "-f", busy.LOOP[-1]]
    return len(subprocess.run(command, capture_output=True, text=True).stdout.split())


def test_busy_processes_end_with_the_block():
    with contextlib.suppress(KeyboardInterrupt), busy.busy(2):
        assert loops() == 2
        raise KeyboardInterrupt
    assert loops() == 0


def test_the_environment_of_each_way_reaches_the_process(monkeypatch):
    """What is called there is told a variable instead of a number of images."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setattr(busy, "image_seconds", os.getenv)
    found = {
        waits: [busy.measure(waits, 0, name)["seconds"] for name in busy.SPIN_VARIABLES]
        for waits in busy.WAITS
    }
    assert busy.SPIN_VARIABLES == ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    assert found == {"OpenMP's default": [None, None], "ecar's": [busy.SPINS, None]}
    assert os.environ["OMP_WAIT_POLICY"] == "active"


def test_the_table():
    text = busy.render({"rows": [row(3.0, 1.5, 0), row(0.2, 0.1)]})
    assert "2.00x" in text and "3.00 s" in text and "200 ms" in text


@pytest.mark.parametrize(("seconds", "well"), [(1.5, True), (1.6, False)])
def test_bench_check_judges_it(monkeypatch, capsys, seconds, well):
    monkeypatch.setattr(busy, "measure", lambda *_, **__: row(seconds, 1.0))
    assert check.check_busy() is well
    assert capsys.readouterr().out.startswith("busy machine" if well else "LOST: busy machine")

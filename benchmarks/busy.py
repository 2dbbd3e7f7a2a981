"""All threads next to one thread where other processes keep every core busy.

One image of E-CAR-S by the default 30 steps, float32, without guidance, drawn on all threads and on
one in turns; on a machine with nothing else to do, and next to one busy loop a core and to three. A
thread of GNU's OpenMP looks for work a number of times before it sleeps: 300,000 times by default,
which a Python program gets that sets nothing, and 3,000 times in the `ecar` commands. The target on
a busy machine is 1.5 times one thread's time.
"""

import contextlib
import operator
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from benchmarks import commands, memory, results, timing
from benchmarks.models import random_model
from benchmarks.results import duration, table, times
from ecar import PRESETS, sample
from ecar.cli import SPIN_VARIABLES, SPINS
from ecar_kernels import accelerate

ROUNDS = 7  # images of each kind
LIMIT = 1.5  # times one thread's time
WAITS = {"OpenMP's default": {}, "ecar's": {SPIN_VARIABLES[0]: SPINS}}
LOOP = (sys.executable, "-c", "while True: pass")


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """As many other processes that never wait."""
    others = [subprocess.Popen(LOOP) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def image_seconds(rounds: int) -> dict[str, float]:
    """Of an image on all threads and on one, in this process: medians."""
    model, threads = random_model(PRESETS["S"]), torch.get_num_threads()
    accelerate(model)
    label = torch.zeros(1, dtype=torch.int64)

    def draw(count: int) -> float:
        torch.set_num_threads(count)
        return timing.seconds_of(lambda: sample(model, label, seeds=label))

    measures = {"all threads": lambda: draw(threads), "one thread": lambda: draw(1)}
    found = timing.rounds(measures, 0.0, at_least=rounds, warm_up=True)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def measure(waits: str, loops: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """A row of the table: an own process, for OpenMP reads its variables once."""
    kept = {name: value for name, value in os.environ.items() if name not in SPIN_VARIABLES}
    with busy(loops), mock.patch.dict(os.environ, kept | WAITS[waits], clear=True):
        return {"waits": waits, "busy": loops, "seconds": memory.alone(image_seconds, rounds)}


def ratio(row: dict[str, Any]) -> float:
    return row["seconds"]["all threads"] / row["seconds"]["one thread"]


def render(record: dict[str, Any]) -> str:
    return table(
        [
            {
                "spins before sleeping": row["waits"],
                "busy processes": str(row["busy"]),
                **{name: duration(seconds) for name, seconds in row["seconds"].items()},
                "all / one": times(ratio(row)),
            }
            for row in record["rows"]
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    loads = [each * results.describe()["cores"] for each in (0, 1, 3)]
    cases = {f"{waits}, {loops} busy": (waits, loops) for loops in loads for waits in WAITS}
    return commands.main(
        "busy", __doc__, lambda case: {"rows": [measure(*case)]}, cases, render,
        same=operator.itemgetter("waits", "busy"), order=[*cases.values()], arguments=arguments,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

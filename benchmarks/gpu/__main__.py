"""`make gpu`: on a machine with a GPU, torch and nvcc, what only such a machine can show.

    check    every op against its reference, an image of each size, the tests for GPUs
    image    what the device does, and latencies of whole images
    ops      `python -m benchmarks --device cuda`: eager ways, then compiled ones; then memcheck

Each has a deadline of its own: the build, without whose CUDA half it stops, then the most telling
rows first. See benchmarks/README.md.
"""

import argparse
import faulthandler
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import commands, results
from benchmarks.gpu import STARTED, build, check, image, ops
from benchmarks.gpu.work import TAIL, Work

# Command -> its parts after the build, and seconds at most of each.
COMMANDS: dict[str, dict[Callable[[Work], None], float]] = {
    "check": {check.accuracy: 50.0, check.images: 45.0, check.tests: 200.0},
    "image": {image.latency: 200.0},
    "ops": {ops.eager: 90.0, ops.compiled: 60.0, ops.memcheck: 60.0},
}
PARTS = sorted(part.__name__ for parts in COMMANDS.values() for part in parts)
RESERVED = 30.0  # of a command's time, for the parts after a long one
STOPPED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = commands.parser("gpu", __doc__, writes=False)
    add = parser.add_argument
    add("commands", nargs="*", choices=[*COMMANDS, "all"], default="all",
        help="default: all; benchmarks/README.md says what each shows")  # fmt: skip
    add("--results", type=Path, metavar="FOLDER", help="default: $OUT, or benchmarks/results")
    add("--seconds", type=float, default=190.0, help="of each command (default: %(default)s)")
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts, after the build")
    add("-k", nargs="+", default=[], metavar="WORD", dest="words", help="rows with all of these")
    carried = "take what `make gpu-pack` left there (build/gpu-carry), if it fits"
    add("--carried", type=Path, nargs="?", const=build.FOLDER, metavar="FOLDER", help=carried)
    add("--dry-run", action="store_true", dest="dry")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        said = f"torch {torch.__version__} sees no CUDA GPU here; --dry-run shows what would run"
        print(f"error: {said}", file=sys.stderr)
        return STOPPED
    begin, status = STARTED, 0
    for command in COMMANDS if "all" in options.commands else options.commands:
        found = run(command, begin + options.seconds, options)
        if found == STOPPED:
            return STOPPED
        begin, status = time.time(), max(status, found)
    return status


def run(command: str, end: float, options: argparse.Namespace) -> int:
    """The parts of a command one after another; its status."""
    work = Work(command, dry=options.dry, words=options.words, carried=options.carried)
    default = results.ROOT / "build" / "gpu-dry-run" if options.dry else results.FOLDER
    folder = options.results or Path(os.environ.get("OUT") or default)
    work.file = results.path(f"gpu-{command}", folder, work.device)
    work.facts = results.describe(work.device) | {"dry_run": options.dry}
    parts = {
        part: most for part, most in COMMANDS[command].items() if part.__name__ in options.only
    }
    if not options.dry:  # of what hangs, rows are kept
        faulthandler.dump_traceback_later(max(end - time.time(), 1) + 5, exit=True)
    for part, most in {build.build: math.inf, **parts}.items():
        work.part = part.__name__
        left = end - time.time()
        kept = 0.0 if part in (build.build, *[*parts][-1:]) else min(RESERVED, left / 2)
        work.deadline = time.time() + min(most, left - kept)
        try:
            part(work)
        except build.StoppedError as error:
            print(f"error: make gpu-{command} stops here: {error}", file=sys.stderr)
            return STOPPED
        except Exception as error:  # the others go on
            traceback.print_exc()
            work.add("failed", str(error), ok=False, output=traceback.format_exc()[-TAIL:])
    faulthandler.cancel_dump_traceback_later()
    print(f"wrote {work.file}", flush=True)
    return int(any(row.get("ok") is False for row in work.rows))


def _terminated(*ignored: object) -> None:
    sys.exit(128 + signal.SIGTERM)  # what was started is ended on the way


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())

"""`make gpu`: on a machine with a GPU, torch and nvcc, what only such a machine can show.

    check    every op against its reference, an image of each size, the tests for GPUs
    image    what the device does, and latencies of whole images
    ops      ops next to other libraries' and to their floors, then memcheck

Each command is of use alone, and ended by a deadline of its own. Its parts have a process each:
the build, without whose CUDA half it stops, then the most telling rows first. A row is in the
record, gpu-COMMAND.json, when it is printed; gpu-COMMAND.md has the tables. A dry run takes tiny
sizes on the CPU, and only names the programs that it would run.
"""

import argparse
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.gpu import STARTED, report
from benchmarks.gpu.build import FOLDER
from benchmarks.gpu.work import OUT_OF_TIME, ROW, TAIL, Work, run

# Command -> part -> seconds at most. A part is the function of that name in the command's module.
COMMANDS = {
    "check": {"build": 110.0, "accuracy": 50.0, "images": 45.0, "tests": 200.0},
    "image": {"build": 110.0, "images": 200.0},
    "ops": {"build": 110.0, "attention": 90.0, "others": 60.0, "memcheck": 60.0},
}
PARTS = sorted({part for parts in COMMANDS.values() for part in parts})
RESERVED = 30.0  # of a command's time, for the parts after a long one
LEAST = 8.0  # seconds that a part needs
MARGIN = 3.0  # a part that ends by itself, having ended what it started, is better than one killed
STOPPED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("commands", nargs="*", choices=[*COMMANDS, "all"], default="all", metavar="COMMAND")
    add("--output", type=Path, help="folder; default: $OUT, or benchmarks/results/<device>")
    add("--seconds", type=float, default=190.0, help="of each command (default: %(default)s)")
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts, after the build")
    add("-k", nargs="+", default=[], metavar="WORD", dest="words", help="rows with all of these")
    carried = "take what `make gpu-pack` left there (build/gpu-carry), if it fits"
    add("--carried", type=Path, nargs="?", const=FOLDER, metavar="FOLDER", help=carried)
    add("--dry-run", action="store_true", dest="dry")
    add("--part", nargs=3, help=argparse.SUPPRESS)  # its command, name and deadline
    options = parser.parse_args(arguments)
    if options.part is not None:
        command, name, deadline = options.part
        module = importlib.import_module(
            f"benchmarks.gpu.{'build' if name == 'build' else command}"
        )
        rest = options.dry, options.words, options.carried
        getattr(module, name)(Work(command, name, float(deadline), *rest))
        return 0
    options.given = sys.argv[1:] if arguments is None else arguments
    if not options.dry and not torch.cuda.is_available():
        said = f"torch {torch.__version__} sees no CUDA GPU here; --dry-run shows what would run"
        print(f"error: {said}", file=sys.stderr)
        return STOPPED
    if options.carried is not None:
        os.environ["TRITON_CACHE_DIR"] = str(results.ROOT / "build" / "triton-cache")
    begin, status = STARTED, 0
    for command in COMMANDS if "all" in options.commands else options.commands:
        found = _command(command, begin + options.seconds, options)
        if found == STOPPED:
            return STOPPED
        begin, status = time.time(), max(status, found)
    return status


def _command(command: str, end: float, options: argparse.Namespace) -> int:
    facts = results.describe() | {"gpu": _gpu(options.dry), "dry_run": options.dry}
    default = os.environ.get("OUT") or results.FOLDER / results.slug(facts["gpu"]["name"])
    file = Path(options.output or default) / f"gpu-{command}.json"
    results.write(file, "gpu", facts, command=command, parts={})
    record = results.read(file)
    names = [name for name in COMMANDS[command] if name in ("build", *options.only)]
    status = 0
    for name in names:
        left = end - time.time()
        if name not in ("build", names[-1]):
            left -= min(RESERVED, left / 2)
        seconds = math.inf if options.dry else min(COMMANDS[command][name], left)
        part = _process(command, name, file, record, seconds, options)
        said = f"{name}: {part['status']}, {len(part['rows'])} rows, {part['seconds']:.0f} s"
        print(said, flush=True)
        if stop := [row["stop"] for row in part["rows"] if row.get("stop")]:
            print(f"error: make gpu-{command} stops here: {stop[0]}", file=sys.stderr)
            return STOPPED
        if part["status"] != "done" or any(row.get("ok") is False for row in part["rows"]):
            status = 1
    print(f"wrote {file} and {file.with_suffix('.md').name}", flush=True)
    return status


def _process(
    command: str,
    name: str,
    file: Path,
    record: dict[str, Any],
    seconds: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Runs a part in a process of its own; its entry in the record, which is in the file."""
    part: dict[str, Any] = {"status": "under way", "seconds": 0.0, "rows": [], "output": ""}
    record["parts"][name] = part
    begin = time.time()

    def line(text: str) -> None:
        if text.startswith(ROW):
            part["rows"].append(json.loads(text.removeprefix(ROW)))
            results.save(file, record)
        else:
            part["output"] = (part["output"] + text)[-TAIL:]
            print(text, end="", flush=True)

    if seconds < LEAST:
        part["status"] = "not begun, no time left"
    else:
        argv = [sys.executable, "-m", "benchmarks.gpu", *options.given]
        argv += ["--part", command, name, str(begin + seconds - MARGIN)]
        code, _ = run(argv, seconds, line=line)
        ended = f"cut off after {seconds:.0f} s" if code == OUT_OF_TIME else f"failed with {code}"
        part |= {"status": ended if code else "done", "seconds": time.time() - begin}
        part["output"] = part["output"] if code else ""
    results.save(file, record)
    file.with_suffix(".md").write_text(report.render(record) + "\n", encoding="utf-8")
    return part


def _gpu(dry: bool) -> dict[str, Any]:
    if dry:
        return {"name": "none"}
    found = torch.cuda.get_device_properties(0)
    names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
    driver = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
    versions = {"CUDA": torch.version.cuda, "driver": subprocess.getoutput(driver)}
    return {name: getattr(found, name) for name in names} | versions


def _terminated(*ignored: object) -> None:
    sys.exit(128 + signal.SIGTERM)  # what was started is ended on the way


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())

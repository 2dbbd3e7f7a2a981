"""`make gpu`: on a machine with a GPU, torch and nvcc, what only such a machine can show.

    python -m benchmarks.gpu [check] [image] [ops] [--seconds 190] [--output FOLDER]
                             [--only PART ...] [-k WORD ...] [--carried [FOLDER]] [--dry-run]

Three commands, each of use alone and ended by a deadline of its own:

    check    every op against its reference, an image of each size, the tests for GPUs
    image    what the device does, and latencies of whole images
    ops      ops next to other libraries' and to their floors, then memcheck

Each first builds the library for this device (or takes a carried one that fits) and stops, with
the reason, where its CUDA half is not there. Then come its parts, each in a process of its own, the
most telling rows first. A row is in the record, gpu-COMMAND.json, before the next is begun; tables
are in gpu-COMMAND.md. Nothing is fetched and nothing installed. A dry run takes tiny sizes on the
CPU, and only names the programs that it would run.
"""

import argparse
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.gpu import STARTED, carry, report
from benchmarks.gpu.process import follow_process
from benchmarks.gpu.work import Work

BUILD = {"build": ("checks:build", 110.0)}
# Command -> part -> (module:function, seconds at most).
COMMANDS = {
    "check": {
        **BUILD,
        "accuracy": ("checks:accuracy", 50.0),
        "images": ("checks:images", 45.0),
        "tests": ("checks:tests", 200.0),
    },
    "image": {**BUILD, "images": ("image:run", 200.0)},
    "ops": {
        **BUILD,
        "attention": ("ops:attention", 90.0),
        "others": ("ops:others", 60.0),
        "memcheck": ("checks:memcheck", 60.0),
    },
}
SECONDS = 190.0
MARGIN = 3  # a part that ends by itself, having ended what it started, is better than one killed
RESERVED = 30.0  # of a command's time, for the parts after a long one
TAIL = 40  # lines kept of a part that failed
STOPPED = 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("commands", nargs="*", metavar="COMMAND", help="default: all three")
    add("--output", type=Path, help="folder; default: $OUT, or benchmarks/results/<device>")
    add("--seconds", type=float, default=SECONDS, help="of each command (default: %(default)s)")
    add("--only", nargs="+", metavar="PART", help="these parts, after the build")
    add("-k", nargs="+", default=[], metavar="WORD", dest="words", help="rows with all of these")
    carried = "take what `make gpu-pack` left there (build/gpu-carry), if it fits"
    add("--carried", type=Path, nargs="?", const=carry.FOLDER, metavar="FOLDER", help=carried)
    add("--dry-run", action="store_true")
    add("--part", help=argparse.SUPPRESS)
    add("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    commands = options.commands or list(COMMANDS)
    parts = sorted({part for name in commands for part in COMMANDS.get(name, ())})
    for argument, given, expected in (
        ("COMMAND", commands, list(COMMANDS)),
        ("--only", options.only or [], parts),
    ):
        if unknown := [word for word in given if word not in expected]:
            said = f"expected {', '.join(expected)}, got {unknown[0]!r}"
            parser.error(f"argument {argument}: {said}")
    if options.part is not None:
        return _part(options, commands[0])
    if not options.dry_run and not torch.cuda.is_available():
        said = f"torch {torch.__version__} sees no CUDA GPU here; --dry-run shows what would run"
        print(f"error: {said}", file=sys.stderr)
        return STOPPED
    if options.carried is not None:
        os.environ["TRITON_CACHE_DIR"] = str(results.ROOT / "build" / "triton-cache")
    begin, status = STARTED, 0
    for command in commands:
        found = _command(command, begin + options.seconds, options)
        if found == STOPPED:
            return STOPPED
        begin, status = time.time(), max(status, found)
    return status


def _terminated(*ignored: object) -> None:
    sys.exit(128 + signal.SIGTERM)  # what was started is ended on the way


def _part(options: argparse.Namespace, command: str) -> int:
    """One part, in this process."""
    module, name = COMMANDS[command][options.part][0].split(":")
    work = Work(
        command,
        options.part,
        options.output,
        options.deadline,
        options.dry_run,
        tuple(options.words),
        options.carried,
    )
    getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)(work)
    return 0


def _command(command: str, end: float, options: argparse.Namespace) -> int:
    facts = results.describe() | {"gpu": _gpu(options.dry_run), "dry_run": options.dry_run}
    folder = options.output or _folder(facts)
    file = folder / f"gpu-{command}.json"
    results.write(file, "gpu", facts, command=command, parts={})
    parts = {
        name: limit
        for name, (_, limit) in COMMANDS[command].items()
        if options.only is None or name in (*BUILD, *options.only)
    }
    status = 0
    for position, (name, limit) in enumerate(parts.items()):
        left = end - time.time()
        if position < len(parts) - 1 and name not in BUILD:
            left -= min(RESERVED, left / 2)
        if not options.dry_run and left < 5 + MARGIN:
            part = {"status": "not begun, no time left", "seconds": 0.0, "rows": [], "output": ""}
            print(f"{name}: {part['status']}", flush=True)
        else:
            seconds = math.inf if options.dry_run else min(limit, left)
            part = _process(command, name, file, seconds, options)
        record = results.read(file)
        record["parts"][name] = part
        results.save(file, record)
        _render(file)
        if stop := [row["stop"] for row in part["rows"] if row.get("stop")]:
            print(f"error: make gpu-{command} stops here: {stop[0]}", file=sys.stderr)
            return STOPPED
        bad = part["status"] != "done" or any(row.get("ok") is False for row in part["rows"])
        status = max(status, int(bad))
    print(f"wrote {file} and {file.with_suffix('.md').name}", flush=True)
    return status


def _process(
    command: str, name: str, file: Path, seconds: float, options: argparse.Namespace
) -> dict[str, Any]:
    """The part's record: it has written the rows itself, one by one."""
    begin, deadline = time.perf_counter(), time.time() + seconds - MARGIN
    argv = [sys.executable, "-m", "benchmarks.gpu", command, "--part", name]
    argv += ["--output", str(file), "--deadline", str(deadline)]
    argv += ["--dry-run"] * options.dry_run
    argv += ["--carried", str(options.carried)] if options.carried is not None else []
    argv += ["-k", *options.words] if options.words else []
    tail: deque[str] = deque(maxlen=TAIL)

    def follow(line: str) -> None:
        tail.append(line)
        print(line, end="", flush=True)

    code = follow_process(argv, seconds, follow)
    status = "done" if code == 0 else f"failed with status {code}"
    if code is None:
        status = f"cut off after {seconds:.0f} s"
    rows = results.read(file)["parts"].get(name, {}).get("rows", [])
    taken = time.perf_counter() - begin
    print(f"{name}: {status}, {len(rows)} rows, {taken:.0f} s", flush=True)
    output = "" if status == "done" else "".join(tail)
    return {"status": status, "seconds": taken, "rows": rows, "output": output}


def _gpu(dry: bool) -> dict[str, Any]:
    if dry:
        return {"name": "none"}
    found = torch.cuda.get_device_properties(0)
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:
        driver = None
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory": found.total_memory,
        "L2": found.L2_cache_size,
        "CUDA": torch.version.cuda,
        "driver": driver,
    }


def _folder(facts: dict[str, Any]) -> Path:
    if "OUT" in os.environ:
        return Path(os.environ["OUT"])
    return results.FOLDER / results.slug(facts["gpu"]["name"])


def _render(file: Path) -> None:
    partial = file.with_suffix(".md.partial")
    partial.write_text(report.render(results.read(file)) + "\n", encoding="utf-8")
    partial.replace(file.with_suffix(".md"))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())

"""`make gpu`: on a machine with a GPU, torch and nvcc, all that only such a machine can show.

    python -m benchmarks.gpu [--output FOLDER] [--seconds 530] [--only PART ...] [--dry-run]

Parts run in processes of their own, the most important first, each within a time of its own; the
record (gpu.json) and its tables (gpu.md) are written anew after each, so that a run that is cut
off leaves what it had. Nothing is fetched and nothing installed. A dry run takes tiny sizes on the
CPU and only names the commands that it would run.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, results
from benchmarks.gpu import report
from benchmarks.gpu.work import Work

# Part -> (module:function, seconds). The order is that of importance.
PARTS = {
    "build": ("benchmarks.gpu.checks:build", 100),
    "compile": ("benchmarks.gpu.checks:compile_kernels", 45),
    "rates": ("benchmarks.gpu.rates:run", 25),
    "end_to_end": ("benchmarks.gpu.end_to_end:run", 145),
    "tests": ("benchmarks.gpu.checks:tests", 90),
    "micro": ("benchmarks.gpu.micro:run", 80),
    "sanitize": ("benchmarks.gpu.checks:sanitize", 50),
}
SECONDS = 530
MARGIN = 4  # a part that ends by itself, having killed what it started, is better than one killed
TAIL = 3000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of gpu.json and gpu.md; default: $OUT, "
                        "or benchmarks/results/<device>")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts together")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--rates", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part is not None:
        return _part(options)
    if not options.dry_run and not torch.cuda.is_available():
        print(f"error: torch {torch.__version__} sees no CUDA GPU here; --dry-run shows what "
              "would run", file=sys.stderr)
        return 2
    return _all(options)


def _part(options: argparse.Namespace) -> int:
    """One part, in this process."""
    module, name = PARTS[options.part][0].split(":")
    work = Work(options.rows, options.deadline, options.dry_run, options.rates)
    getattr(importlib.import_module(module), name)(work)
    return 0


def _all(options: argparse.Namespace) -> int:
    begin = time.perf_counter()
    facts = environment.describe() | {"gpu": _gpu(options.dry_run), "dry_run": options.dry_run}
    folder = options.output or _folder(facts)
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {}
    rates: dict[str, float] = {}
    # A few parts alone may take the time of all.
    longer = max(1.0, options.seconds / sum(PARTS[name][1] for name in options.only))
    for name in PARTS:
        if name not in options.only:
            continue
        left = options.seconds - (time.perf_counter() - begin)
        if left < 5:
            parts[name] = {"status": "not begun, no time left", "seconds": 0.0, "rows": [],
                           "output": ""}
        else:
            parts[name] = _process(name, min(longer * PARTS[name][1], left), rates, options.dry_run)
        if name == "rates":
            rates = {row["name"]: row["value"] for row in parts[name]["rows"]}
        _write(folder, facts, parts)
        print(f"{name}: {parts[name]['status']}, {parts[name]['seconds']:.0f} s", flush=True)
    print(report.render({"environment": facts, "parts": parts}))
    print(f"wrote {folder / 'gpu.json'} and {folder / 'gpu.md'}")
    well = all(part["status"] == "done" and all(row.get("ok", True) for row in part["rows"])
               for part in parts.values())
    return 0 if well else 1


def _process(name: str, seconds: float, rates: dict[str, float], dry: bool) -> dict[str, Any]:
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--rows", str(rows),
                   "--deadline", str(time.time() + seconds - MARGIN),
                   "--rates", json.dumps(rates)]
        with (Path(scratch) / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
            process = subprocess.Popen(
                [*command, *(["--dry-run"] if dry else [])], cwd=results.ROOT, stdout=log,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
            try:
                code = process.wait(seconds)
                status = "done" if code == 0 else f"failed with status {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own
                process.wait()
                status = f"cut off after {seconds:.0f} s"
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            log.seek(0)
            output = log.read()[-TAIL:]
        found = json.loads(rows.read_text("utf-8")) if rows.is_file() else []
    return {"status": status, "seconds": time.perf_counter() - begin, "rows": found,
            "output": output}


def _gpu(dry: bool) -> dict[str, Any]:
    if dry:
        return {"name": "none"}
    found = torch.cuda.get_device_properties(0)
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                            capture_output=True, text=True)
    return {"name": found.name, "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count, "memory": found.total_memory,
            "L2": found.L2_cache_size, "CUDA": torch.version.cuda,
            "driver": driver.stdout.strip()}


def _folder(facts: dict[str, Any]) -> Path:
    if "OUT" in os.environ:
        return Path(os.environ["OUT"])
    return results.FOLDER / environment.slug(facts["gpu"]["name"])


def _write(folder: Path, facts: dict[str, Any], parts: dict[str, Any]) -> None:
    results.write(folder / "gpu.json", "gpu", facts, parts=parts)
    text = report.render({"environment": facts, "parts": parts})
    partial = folder / "gpu.md.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(folder / "gpu.md")


if __name__ == "__main__":
    sys.exit(main())

"""The parts that run other programs: the build, the kernels' compilation, tests, sanitizers."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

import torch

from benchmarks.gpu import end_to_end
from benchmarks.gpu.work import Work

ROOT = Path(__file__).parent.parent.parent
NEEDED_BY_TESTS = ("pytest", "hypothesis")
TOOLS = ("memcheck", "racecheck")
TAIL = 2000  # characters kept of what failed


def build(work: Work) -> None:
    """The extension in place, for this device's architecture; no network, no isolation."""
    major, minor = (9, 0) if work.dry else torch.cuda.get_device_capability()
    flags = f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}-real"
    environment = {"CMAKE_ARGS": f"{flags} {os.environ.get('CMAKE_ARGS', '')}".strip(),
                   "ECAR_REQUIRE_NATIVE": "1"}
    code, output = _run(work, [sys.executable, "setup.py", "build_ext", "--inplace"], environment)
    work.add(what="build", ok=code == 0, output=output[-TAIL:] if code else "")
    code, output = _run(work, [sys.executable, "-m", "ecar_kernels"])
    work.add(what="backends", ok=code == 0, output=output)


def compile_kernels(work: Work) -> None:
    """Triton's kernels of all rows of the end-to-end part, on all cores, into Triton's cache."""
    rows = end_to_end.DRY_ROWS if work.dry else end_to_end.ROWS
    groups = sorted({(row.size, row.numbers, row.batch > 1) for row in rows})
    commands = [[sys.executable, "-m", "benchmarks.gpu.end_to_end", json.dumps(
        [astuple(row) for row in rows if (row.size, row.numbers, row.batch > 1) == group])]
        for group in groups]
    with ThreadPoolExecutor(len(groups)) as pool:
        outcomes = list(pool.map(lambda command: _run(work, command), commands))
    for (size, numbers, batched), (code, output) in zip(groups, outcomes, strict=True):
        work.add(size=size, numbers=numbers, batch="8, 64" if batched else "1", ok=code == 0,
                 output=output[-TAIL:] if code else "")


def suites() -> dict[str, list[str]]:
    """pytest's arguments; only files with a test for GPUs, others may need what is not here."""
    files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py")
                   if "mark.gpu" in file.read_text("utf-8"))
    return {"marked gpu": ["-m", "gpu", *files],
            "Triton's kernels, compiled": ["tests/ecar_kernels/triton"]}


def tests(work: Work) -> None:
    missing = [name for name in NEEDED_BY_TESTS if importlib.util.find_spec(name) is None]
    if missing:
        work.add(suite="all", ok=False, output=f"not installed here: {', '.join(missing)}")
        return
    workers = ("-n", "8") if importlib.util.find_spec("xdist") and not work.dry else ()
    for suite, chosen in suites().items():
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            code, output = _run(work, [sys.executable, "-m", "pytest", "-q", "--tb=short",
                                       "-p", "no:cacheprovider", *workers,
                                       f"--junitxml={report}", *chosen])
            counts = _counts(report)
        work.add(suite=suite, ok=code == 0, **counts, output="" if code == 0 else output[-TAIL:])


def _counts(report: Path) -> dict:
    """Tests by outcome, and the failed ones' names."""
    if not report.is_file():
        return {}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    found = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [case.get("name") for case in suite.iter("testcase")
              if case.find("failure") is not None or case.find("error") is not None]
    return {**found, "failed": failed}


def sanitize(work: Work) -> None:
    places = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")
    program = next((place for place in places if place and Path(place).is_file()), None)
    if program is None and not work.dry:
        work.add(tool="compute-sanitizer", ok=False, output="not installed here")
        return
    for tool in TOOLS:
        # An allocation each: what lies beyond a tensor is not another one's.
        code, output = _run(
            work, [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
                   sys.executable, "-m", "benchmarks.gpu.small", work.device.type],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        errors = re.search(r"ERROR SUMMARY: (\d+) error", output)
        calls = re.search(r"^(\d+) calls$", output, re.MULTILINE)
        work.add(tool=tool, ok=code == 0, errors=errors and int(errors[1]),
                 calls=calls and int(calls[1]), output="" if code == 0 else output[-TAIL:])


def _run(work: Work, command: list[str], environment: dict[str, str] | None = None
         ) -> tuple[int, str]:
    """Exit status and output; a command cut off at the part's deadline has status 124."""
    if work.dry:
        return 0, f"dry run, not run: {' '.join(command)}"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=output,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = process.wait(max(work.left, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own
            process.wait()
            code = 124
        output.seek(0)
        return code, output.read()

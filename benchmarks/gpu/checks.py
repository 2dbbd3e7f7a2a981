"""The parts that run other programs: the build, the tests, the sanitizers."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from benchmarks.gpu.work import Work

ROOT = Path(__file__).parent.parent.parent
SUITES = {
    "marked gpu": ("-m", "gpu", "tests"),
    "Triton kernels, compiled": ("tests/ecar_kernels/triton",),
}
NEEDED_BY_TESTS = ("pytest", "hypothesis")
TOOLS = ("memcheck", "racecheck")
TAIL = 2000  # characters kept of what failed


def build(work: Work) -> None:
    """The extension in place, for this device's architecture; no network, no isolation."""
    major, minor = (9, 0) if work.dry else torch.cuda.get_device_capability()
    flags = f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}-real"
    environment = {"CMAKE_ARGS": f"{flags} {os.environ.get('CMAKE_ARGS', '')}".strip()}
    code, output = _run(work, [sys.executable, "setup.py", "build_ext", "--inplace"], environment)
    work.add(what="build", ok=code == 0, output=output[-TAIL:] if code else "")
    code, output = _run(work, [sys.executable, "-m", "ecar_kernels"])
    work.add(what="backends", ok=code == 0, output=output)


def tests(work: Work) -> None:
    missing = [name for name in NEEDED_BY_TESTS if importlib.util.find_spec(name) is None]
    if missing:
        work.add(suite="all", ok=False, output=f"not installed here: {', '.join(missing)}")
        return
    workers = ("-n", "8") if importlib.util.find_spec("xdist") and not work.dry else ()
    for suite, chosen in SUITES.items():
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

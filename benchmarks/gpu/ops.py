"""The parts of `make gpu-ops`: rows of `python -m benchmarks --device cuda`, and memcheck."""

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence

from benchmarks import cases, micro
from benchmarks.gpu.work import Work


def eager(work: Work) -> None:
    """All rows, without what has to be compiled for seconds."""
    _rows(work, "--no-compile")


def compiled(work: Work) -> None:
    """The largest model's once more, with torch.compile and FlexAttention."""
    _rows(work, words=["L-256tokens-batch1"])


def _rows(work: Work, *how: str, words: Sequence[str] = ()) -> None:
    words = [*words, *work.words]
    if work.dry:
        words = ["euler_step-forward---16tokens-batch1"]
    minutes = max(min(work.left, 600) - 20, 1) / 60  # a row may take 20 seconds
    argv = [sys.executable, "-m", "benchmarks", f"--device={work.device.type}", *how]
    argv += ["--seconds=0.05", f"--minutes={minutes}", f"--results={work.file.parent.parent}"]
    work.run("rows", [*argv, "-k", *words] if words else argv, when_dry=True)


def memcheck(work: Work) -> None:
    """compute-sanitizer's memcheck over every op on small tensors."""
    places = "/usr/local/cuda/bin", os.environ["PATH"]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if program is None and not work.dry:
        work.add("memcheck", skipped="compute-sanitizer is not installed here")
    elif work.begins("memcheck", 15):
        watch = [program or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
        watched = [sys.executable, "-m", "benchmarks.gpu.build", "check", "-k", "small"]
        # An allocation each: what lies beyond a tensor is not another one's.
        work.run("memcheck", [*watch, *watched], PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def warm_items(work: Work) -> Iterator[tuple[str, Callable[[], object]]]:
    """One call of each case that Triton serves."""
    for case in micro.choose(device=work.device, dtype="bfloat16"):
        if run := cases.backends(case, work.device).get("triton"):
            yield case.name, functools.partial(_once, work, case, run)


def _once(work: Work, case: cases.Case, run: Callable) -> None:
    next(micro.calls(case, run, [cases.inputs(case, work.device)]))()

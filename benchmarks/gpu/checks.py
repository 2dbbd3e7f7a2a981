"""The parts of `make gpu-check`, and what every command begins with: the build, and compiling."""

import importlib.util
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.gpu import calls, carry, image, ops
from benchmarks.gpu.process import run
from benchmarks.gpu.work import Work, served
from benchmarks.results import ROOT
from ecar import ECARPipeline, sample
from ecar_kernels import _native, testing, use_backend
from ecar_kernels.registry import OPS, resolve

TAIL = 2000  # characters kept of what failed
PROCESSES = 12  # that compile at once
# What is run first, in case a run is cut off: the sampler as it is used, then the ops.
FIRST_TESTS = (
    "test_graph_gpu",
    "test_flow_step",
    "test_flow_boundary",
    "test_flow_block_triton",
    "test_stage_attention_triton",
    "test_adaln_triton",
)
OUTCOME = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)")


def build(work: Work) -> None:
    """The library for this device, carried along or built here, whose CUDA half must load; then
    Triton's kernels of the command."""
    why_not = carry.install_library(work.carried, work.dry) if work.carried else "none is carried"
    if work.carried:
        work.add("carried library", why_not or "used", used=why_not is None, why_not=why_not)
    reason = None
    if why_not is not None:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        code, output = run(work, command, carry.build_variables(carry.architecture(work.dry)))
        if code != 0:  # a library of an earlier build may load all the same
            reason = f"the build failed: {(output.strip().splitlines() or [str(code)])[-1]}"
        work.add("build", ok=code == 0, output=output[-TAIL:] if code else "")
    # This process has loaded nothing yet: what it finds is what the next parts will.
    reason = reason or (_native.why_not() if work.dry else _native.why_not_cuda())
    name = "C++ library" if work.dry else "CUDA half"
    work.add(name, reason or "loaded", ok=reason is None, stop=reason)
    if reason is None:
        names = {op: served(op, work.device, torch.bfloat16) for op in OPS}
        work.add("backends", ", ".join(f"{op}: {name}" for op, name in names.items()), served=names)
        compile_kernels(work)


def warm_items(work: Work) -> list[tuple[str, Callable[[], object]]]:
    """What has each Triton kernel of a command's rows compiled, by name."""
    if work.command == "check":
        return [(call.name, call.once) for call in calls.calls(work.device)]
    return list((image if work.command == "image" else ops).warm_items(work))


def compile_kernels(work: Work) -> None:
    """Triton's kernels of this command's rows into its cache: carried along, or by all cores."""
    if work.carried is not None:
        why_not, count = carry.install_kernels(work.carried, carry.architecture(work.dry))
        work.add("carried kernels", why_not or f"{count} used", count=count, why_not=why_not)
        if why_not is None:
            return
    count = 1 if work.dry else min(PROCESSES, os.cpu_count() or 1)
    commands = [carry.warm_command(work.command, i, count) for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        for i, (code, output) in enumerate(pool.map(lambda argv: run(work, argv), commands)):
            output = output[-TAIL:] if code else ""
            name = f"kernels compiled, {i + 1} of {count}"
            work.add(name, ok=code in (0, 124), output=output)


def accuracy(work: Work) -> None:
    """Every op by every backend against its reference: float64's, on this device."""
    for call in calls.calls(work.device, calls.SMALL if work.dry else calls.LAYOUTS):
        if not work.begins(call.name, 1):
            continue
        reference = resolve(call.op, device=work.device, dtype=call.dtype, backend="reference")
        row = {"op": call.op, "served": call.backend, "gradients": call.gradients}
        try:
            with torch.set_grad_enabled(call.gradients):
                found = testing.judge(
                    call.function, reference, call.given(), gradients=call.gradients
                )
        except Exception as error:  # one op's failure is its row, and the others go on
            _failed(work, call.name, error, **row)
            continue
        worst = _worst(found)
        work.add(call.name, str(worst), **row, **_judged(worst))


def _failed(work: Work, name: str, error: Exception, **row: object) -> None:
    said = f"{type(error).__name__}: {str(error)[:TAIL]}"
    work.add(name, said.splitlines()[0], ok=False, output=said, **row)


def _worst(found: list[testing.Verdict]) -> testing.Verdict:
    """What failed, or came nearest to it."""
    return max(
        found, key=lambda verdict: (not verdict.ok, verdict.found / max(verdict.allowed, 1e-300))
    )


def _judged(verdict: testing.Verdict) -> dict[str, object]:
    return {name: getattr(verdict, name) for name in ("ok", "what", "found", "allowed")}


def images(work: Work) -> None:
    """One image of each size, by the same rule: accelerated, with graphs, in each dtype, against
    the references on the device, and float64's on the CPU."""
    for size in "S" if work.dry else "SBL":
        if not work.begins(f"E-CAR-{size}, the CPU's", 10):
            continue
        model = image.pipeline(work, size).model
        given = {
            "class_labels": torch.tensor([3]),
            "seeds": torch.tensor([7]),
            "steps": [2] * model.config.num_stages,
        }
        with use_backend("reference"):
            state = {name: value.cpu() for name, value in model.state_dict().items()}
            exact = sample(model.cpu().double(), **given).latents
        work.add(f"E-CAR-{size}, the CPU's", "float64, references")
        for dtype in (torch.bfloat16, torch.float32):
            name = f"E-CAR-{size} {str(dtype).removeprefix('torch.')}"
            if not work.begins(name, 5):
                continue
            model = image.pipeline(work, size).model
            model.load_state_dict(state)
            model.to(dtype)
            with use_backend("reference"):
                usual = sample(model, **given, graphs=False, tf32=False).latents.cpu()
            ECARPipeline(model, accelerate=True)._accelerate()
            try:
                output = sample(model, **given, graphs=not work.dry, tf32=False)
                # The state is float32, whatever the network's dtype.
                worst = _worst(testing.verdicts([output.latents.cpu()], [usual], [exact], dtype))
            except (RuntimeError, AssertionError) as error:
                _failed(work, name, error)
                continue
            graph = output.why_not_graph is None
            work.add(name, str(worst), graph=graph, served=output.served, **_judged(worst))


def suites() -> dict[str, list[str]]:
    """pytest's arguments; only files with a test for GPUs or for every kernel: others may need what
    is not here."""
    texts = {file: file.read_text("utf-8") for file in (ROOT / "tests").rglob("test_*.py")}

    def files(mark: str) -> list[str]:
        found = [file for file, text in texts.items() if mark in text]
        found = sorted(found, key=lambda file: (_place(file.stem), str(file)))
        return [str(file.relative_to(ROOT)) for file in found]

    folder = "tests/ecar_kernels/triton"
    others = [name for name in files("tests.support.backends") if not name.startswith(folder)]
    return {
        "marked gpu": ["-m", "gpu", *files("mark.gpu")],
        "Triton's kernels, compiled": ["-k", "triton", folder, *others],
    }


def _place(stem: str) -> int:
    return FIRST_TESTS.index(stem) if stem in FIRST_TESTS else len(FIRST_TESTS)


def tests(work: Work) -> None:
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") and not work.dry else []
    for suite, chosen in suites().items():
        if work.begins(suite, 10):
            run_tests(work, suite, [*workers, *chosen])


def run_tests(work: Work, suite: str, chosen: list[str]) -> None:
    """A row for each test that does not pass, as it ends, and one of the counts."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        work.add(suite, skipped=f"not installed here: {', '.join(missing)}")
        return
    counts: Counter[str] = Counter()

    def line(text: str) -> None:
        # "tests/a.py::test_b PASSED [ 3%]", or of xdist's workers "[gw0] [ 3%] PASSED a::test_b"
        outcome = OUTCOME.search(text)
        name = next((word for word in text.split() if "::" in word), None)
        if outcome is None or name is None or text.startswith(("FAILED", "ERROR", "SKIPPED")):
            return  # the summary at the end repeats them
        counts[outcome[1].lower()] += 1
        if outcome[1] in ("FAILED", "ERROR"):
            work.add(name, ok=False)
        else:
            print(f"{work.part}: {name}: {outcome[1].lower()}", flush=True)

    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    code, output = run(work, [*command, *chosen], {"PYTEST_ADDOPTS": ""}, line)
    work.add(
        suite,
        ", ".join(f"{count} {name}" for name, count in counts.items()),
        ok=code in (0, 124),
        counts=counts,
        skipped="cut off, no time left" if code == 124 else "",
        output="" if code == 0 else output[-TAIL:],
    )


def memcheck(work: Work) -> None:
    """compute-sanitizer's memcheck over every op on small tensors."""
    places = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")
    program = next((place for place in places if place and Path(place).is_file()), None)
    if program is None and not work.dry:
        work.add("memcheck", skipped="compute-sanitizer is not installed here")
        return
    if not work.begins("memcheck", 15):
        return
    # An allocation each: what lies beyond a tensor is not another one's.
    watch = [program or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    command = [*watch, sys.executable, "-m", "benchmarks.gpu.calls", work.device.type]
    code, output = run(work, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    errors = re.search(r"ERROR SUMMARY: (\d+) error", output)
    done = len(re.findall(rf"^\w+ (?:{'|'.join(calls.KERNELS)}) \w+ \w+$", output, re.MULTILINE))
    work.add(
        "memcheck",
        f"{errors[1] if errors else '?'} errors in {done} calls" if done else "",
        ok=code == 0 or (code == 124 and errors is None),
        calls=done,
        errors=errors and int(errors[1]),
        skipped="cut off, no time left" if code == 124 else "",
        output="" if code == 0 else output[-TAIL:],
    )

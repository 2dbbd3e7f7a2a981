"""Ops at the stages of models against PyTorch and others (`benchmarks.peers`), bfloat16.

Inputs of each repeat are other tensors, together larger than the last-level cache where 256 sets
are enough. Attention is training's, all stages at once, forward and with its backward, and the
sampler's: the newest stage's queries over all keys. Peers that know no block-causal mask get a call
for each stage, over the keys that it sees.
"""

import functools
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, micro, peers
from benchmarks.cases import Case
from benchmarks.gpu.timing import Timer, interleave, measure_rates
from benchmarks.gpu.work import Work
from benchmarks.results import duration
from ecar_kernels.costs import Rates, floor_seconds
from ecar_kernels.registry import BACKENDS, FAMILIES
from ecar_kernels.testing import tensors

MAX_SETS = 256
ADALN = FAMILIES["adaln"]
# The cases of `make bench`, with more of large batches.
CASES = dict.fromkeys([*cases.default(), *cases.select(forward=(8, 64), backward=(1, 8, 64))])


def attention(work: Work) -> None:
    """The eager ways, then what has to be compiled."""
    chosen = _chosen(work, attends=True)
    whole = [case for case in chosen if case.whole or case.backward]
    _rows(work, chosen, whole[:1] if work.dry else whole)


def others(work: Work) -> None:
    """The adaLN family, the flow step, the flow block's products, likewise."""
    chosen = _chosen(work, attends=False)
    large = [case for case in chosen if case.batch == 1 and case.size == "L"]
    _rows(work, chosen, chosen[:1] if work.dry else large)


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
        code, output = work.run([*watch, *watched], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        errors = re.search(r"ERROR SUMMARY: (\d+) error", output)
        done = output.count("kernels compiled")
        said = f"{errors[1] if errors else '?'} errors in {done} calls"
        work.ran("memcheck", code, output, said, calls=done, errors=errors and int(errors[1]))


def warm_items(work: Work) -> Iterator[tuple[str, Callable[[], object]]]:
    """One call of each case that Triton serves."""
    for case in (*_chosen(work, attends=True), *_chosen(work, attends=False)):
        if run := work.backends(case.op, width=case.op_width).get("triton"):
            yield case.name, functools.partial(_warm, work, case, run)


def _warm(work: Work, case: Case, run: Callable) -> None:
    _call(case, run, next(_inputs(work, case, _arena(work, 2**24))))()


def _arena(work: Work, size: int) -> cases.Arena:
    """Random numbers on the device that inputs are cut from."""
    with work.device:
        return cases.Arena(size, torch.bfloat16)


def _chosen(work: Work, attends: bool) -> list[Case]:
    """Attention, or the other ops at E-CAR's sizes: the adaLN family with its backward."""
    found = [
        case
        for case in CASES
        if (case.op == "stage_attention") == attends
        and (attends or (case.size in "-SBL" and (case.op in ADALN or not case.backward)))
    ]
    if work.dry:
        small = {("S", 16), ("-", 16), (cases.VAR, 9)}
        return [case for case in found if (case.size, case.tokens) in small and case.batch == 1]
    return sorted(found, key=lambda case: (case.tokens < 256, case.batch))


def _rows(work: Work, eager: Sequence[Case], compiled: Sequence[Case]) -> None:
    measure_rates(work)
    arena = _arena(work, 2**22 if work.dry else 2**30)
    for chosen, named, seconds in ((eager, "", 2), (compiled, ", compiled", 15)):
        for case in chosen:
            if work.begins(case.name + named, seconds):
                _measure(work, case.name + named, case, arena, _ways(work, case, bool(named)))


def _ways(work: Work, case: Case, compiled: bool) -> dict[str, Callable]:
    """The op's backends and eager peers; or what has to be compiled, and the backend of "auto"."""
    ours, others = (
        work.backends(case.op, width=case.op_width),
        peers.functions(case.op, per_stage=True),
    )
    auto, flex = ours.pop("auto"), others.pop("FlexAttention", None)
    if not compiled:
        return {**ours, **others}
    torch._dynamo.reset()
    made = {"FlexAttention": flex}
    if flex is None:
        made = {"torch.compile": torch.compile(ours["reference"], fullgraph=True, dynamic=False)}
    return {**made, auto.backend: auto}


def _inputs(work: Work, case: Case, arena: cases.Arena) -> Iterator[dict[str, Any]]:
    cache = 2**16 if work.dry else torch.cuda.get_device_properties(work.device).L2_cache_size
    size = 0
    for count in range(MAX_SETS):
        if count >= 2 and size >= 3 * cache:
            return
        given = work.placed(cases.inputs(case, arena))
        yield given
        size += sum(v.numel() * v.element_size() for v in given.values() if isinstance(v, Tensor))


def _call(case: Case, function: Callable, given: dict[str, Any]) -> Callable[[], object]:
    """Forward, or forward with its backward, which a CUDA graph can hold only together."""
    if not case.backward:
        return functools.partial(function, **given)
    sources = {k: v.detach().requires_grad_() for k, v in given.items() if isinstance(v, Tensor)}
    first, *_ = sources.values()
    gradient = torch.randn_like(first)  # of each output, all of one shape

    def call() -> object:
        outputs = tensors(function(**given | sources))
        gradients = [gradient] * len(outputs)
        return torch.autograd.grad(outputs, [*sources.values()], gradients, allow_unused=True)

    return call


def _measure(
    work: Work, name: str, case: Case, arena: cases.Arena, ways: dict[str, Callable]
) -> None:
    sets = list(_inputs(work, case, arena))
    timers: dict[str, Timer] = {}

    def prepare(way: str) -> None:
        timers[way] = Timer([_call(case, ways[way], given) for given in sets])

    tried = {way: peers.why_not(functools.partial(prepare, way)) for way in ways}
    failed = {way: reason for way, reason in tried.items() if reason is not None}
    row: dict[str, Any] = {key: getattr(case, key) for key in ("op", "size", "tokens", "batch")}
    forward = "training forward" if case.whole else "eager"
    row["group"] = "forward and backward" if case.backward else forward
    row["served"] = work.backends(case.op, width=case.op_width)["auto"].backend
    row |= {"sets": len(sets), "failed": failed, "ways": interleave(timers, work.span(0.05))}
    least = micro.case_cost(replace(case, backward=False), sets[0])
    if case.backward:
        least += micro.case_cost(case, sets[0])
    rates = work.rates
    row["floor"] = floor_seconds(least, Rates(rates["copy"], rates["bfloat16"]))
    medians = {way: found["median"] for way, found in row["ways"].items()}
    if medians:
        best = min(medians.values())
        row |= {"GB/s": least.bytes / best / 1e9, "TFLOP/s": 2e-12 * least.multiply_adds / best}
    said = ", ".join(f"{way} {duration(seconds)}" for way, seconds in medians.items())
    # A backend that fails is a failure; a peer's is its reason.
    work.add(name, said, ok=not set(BACKENDS) & failed.keys(), **row)

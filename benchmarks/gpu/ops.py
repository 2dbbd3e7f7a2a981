"""Ops at the stages of models against PyTorch and others (`benchmarks.peers`), bfloat16.

Inputs of each repeat are other tensors, together larger than the last-level cache where 256 sets
are enough. Attention is training's, all stages at once, forward and with its backward, and the
sampler's: the newest stage's queries over all keys. Peers that know no block-causal mask get a call
for each stage, over the keys that it sees.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, micro, peers
from benchmarks.cases import Case
from benchmarks.gpu.timing import Timer, interleave, measure_rates
from benchmarks.gpu.work import Work, served
from benchmarks.results import duration
from ecar_kernels.costs import BACKWARD_READS, Rates, floor_seconds
from ecar_kernels.registry import BACKENDS, FAMILIES, BackendUnavailableError, resolve
from ecar_kernels.testing import tensors

DTYPE = torch.bfloat16
MAX_SETS = 256
WHOLE = ("L", "L-512px", "L-1024px", cases.VAR, "S", "B")  # 336, 1,344, 5,440 and 680 tokens
Functions = dict[str, Callable]


class Arena(cases.Arena):
    """Random numbers on the device that inputs are cut from."""

    def __init__(self, size: int, device: torch.device) -> None:
        with torch.device(device):
            super().__init__(size, DTYPE)


def attention(work: Work) -> None:
    """Training's whole attentions first, then the sampler's, then what has to be compiled."""
    measure_rates(work)
    _rows(work, [*_whole(work), *_newest(work, FAMILIES["stage_attention"])])
    _rows(work, _whole(work)[-1 if work.dry else 0 :], compiled=True)


def others(work: Work) -> None:
    """The adaLN family forward and with its backward, the flow step, the flow block's products."""
    family = _family(work, "adaln")
    newest = _newest(work, (*FAMILIES["flow_step"], *FAMILIES["flow_boundary"]))
    _rows(work, [*family, *newest, *_family(work, "flow_block")])
    large = [case for case in family if case.batch == 1 and case.size == "L"]
    _rows(work, family[:1] if work.dry else large, compiled=True)


def warm_items(work: Work) -> Iterator[tuple[str, Callable[[], object]]]:
    """One call of each case that Triton serves."""
    newest = _newest(work, FAMILIES["stage_attention"])
    families = [case for name in ("adaln", "flow_block") for case in _family(work, name)]
    for case in [*_whole(work), *newest, *families]:
        if (function := _ours(work, case).get("triton")) is not None:
            yield case.name, lambda case=case, function=function: _warm(work, case, function)


def _warm(work: Work, case: Case, function: Callable) -> None:
    with torch.set_grad_enabled(case.backward):
        given = next(_inputs(case, Arena(2**24, work.device), work.device, 0))
        _call(case, function, given)()


def _rows(work: Work, chosen: Sequence[Case], *, compiled: bool = False) -> None:
    arena = Arena(2**22 if work.dry else 2**30, work.device)
    for case in chosen:
        name = f"{case.name}, compiled" if compiled else case.name
        if work.begins(name, 15 if compiled else 2):
            with torch.set_grad_enabled(case.backward):
                _measure(work, name, case, arena, _variants(work, case, compiled))


def _variants(work: Work, case: Case, compiled: bool) -> Functions:
    """The op's backends and eager peers; or what has to be compiled, and the backend of "auto"."""
    ours = _ours(work, case)
    others = peers.functions(case.op, per_stage=True)
    flex = others.pop("FlexAttention", None)
    if not compiled:
        return {**ours, **others}
    torch._dynamo.reset()
    last = dict(list(ours.items())[-1:])
    if flex is not None:
        return {"FlexAttention": flex, **last}
    made = torch.compile(ours["reference"], fullgraph=True, dynamic=False)
    return {"torch.compile": made, **last}


def _whole(work: Work) -> list[Case]:
    """All stages at once, forward and backward, at batch 1, and E-CAR-L's at 32."""
    if work.dry:
        return [
            Case("stage_attention", 16, 1, "S", backward, whole=not backward)
            for backward in (False, True)
        ]
    one = [case for size in WHOLE for case in cases.attention(size)]
    return [*one, *(dataclasses.replace(case, batch=32) for case in cases.attention("L"))]


def _newest(work: Work, ops: tuple[str, ...]) -> list[Case]:
    """The sampler's calls: E-CAR's stages, the longest first, larger images' and VAR's."""
    if work.dry:
        known = [op for op in ops if op not in cases.WIDTHLESS]
        small = [Case(op, 16, 1, "S" if op in known else "-") for op in ops]
        return [*small, *(Case(op, 9, 1, cases.VAR) for op in known)]
    found = sorted(
        cases.select(forward=(1, 8, 64), ops=ops),
        key=lambda case: (case.batch, "-LSB".index(case.size), -case.tokens),
    )
    larger = [case for pixels in (1024, 512) for case in cases.large(pixels)]
    every = [*found, *larger, *reversed(cases.var())]
    return [case for case in every if case.op in ops and not case.backward]


def _family(work: Work, family: str) -> list[Case]:
    """A family's ops at E-CAR's stages, forward and, where they have one, backward."""
    ops = FAMILIES[family]
    if work.dry:
        return [
            Case(op, 16, 1, "S", backward)
            for op in ops
            for backward in (False, True)
            if not backward or op in BACKWARD_READS
        ]
    return sorted(
        cases.select(forward=(1, 8, 64), backward=(1, 8, 64), ops=ops),
        key=lambda case: (case.tokens != 256, case.batch, "LSB".index(case.size), case.backward),
    )


def _ours(work: Work, case: Case) -> Functions:
    """The op by backend, the reference first and what "auto" takes last."""
    found = {}
    for name in BACKENDS:
        try:
            found[name] = resolve(
                case.op, device=work.device, dtype=DTYPE, width=case.op_width, backend=name
            )
        except BackendUnavailableError:
            continue
    return found


def _inputs(case: Case, arena: Arena, device: torch.device, cache: int) -> Iterator[dict[str, Any]]:
    size, sets = 0, 0
    while sets < 2 or (size < 3 * cache and sets < MAX_SETS):
        made = cases.inputs(case, arena)
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()}
        if "device" in given:
            given["device"] = device
        yield given
        sets += 1
        size += sum(v.numel() * v.element_size() for v in given.values() if isinstance(v, Tensor))


def _call(case: Case, function: Callable, given: dict[str, Any]) -> Callable[[], object]:
    """Forward, or forward with its backward, which a CUDA graph can hold only together."""
    if not case.backward:
        return lambda: function(**given)
    leaves = {
        name: value.detach().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    sources = [value for value in leaves.values() if isinstance(value, Tensor)]
    like = "q" if case.op == "stage_attention" else "x"
    gradient = torch.randn_like(given[like])  # of each output, all of one shape

    def call() -> object:
        outputs = tensors(function(**leaves))
        return torch.autograd.grad(outputs, sources, [gradient] * len(outputs), allow_unused=True)

    return call


def _measure(work: Work, name: str, case: Case, arena: Arena, variants: Functions) -> None:
    sets = list(_inputs(case, arena, work.device, work.cache_bytes))
    timers: dict[str, Timer] = {}
    failed: dict[str, str] = {}
    for variant, function in variants.items():

        def add(variant: str = variant, function: Callable = function) -> None:
            timers[variant] = Timer([_call(case, function, given) for given in sets])

        if (reason := peers.why_not(add)) is not None:  # a cell that says so
            failed[variant] = reason
    forward = "training forward" if case.whole else "eager"
    row: dict[str, Any] = micro.identity(case) | {
        "group": "forward and backward" if case.backward else forward,
        "sets": len(sets),
        "served": served(case.op, work.device, DTYPE, case.op_width),
        "failed": failed,
    }
    if timers:
        row["variants"] = interleave(timers, work.span(0.05))
    least = micro.case_cost(dataclasses.replace(case, backward=False), sets[0])
    if case.backward:
        least += micro.case_cost(case, sets[0])
    row |= {"bytes": least.bytes, "multiply_adds": least.multiply_adds}
    if {"copy", "bfloat16"} <= work.rates.keys():
        row["floor"] = floor_seconds(least, Rates(work.rates["copy"], work.rates["bfloat16"]))
    timed = row.get("variants", {}).items()
    said = ", ".join(f"{variant} {duration(found['median'])}" for variant, found in timed)
    # A backend that fails is a failure; a peer's is its reason.
    work.add(name, said, ok=not set(BACKENDS) & failed.keys(), **row)

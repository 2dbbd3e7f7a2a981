"""Ops at the stages of models against PyTorch and others (`benchmarks.peers`), bfloat16.

Inputs of each repeat are other tensors, together larger than the last-level cache where 256 sets
are enough. Attention is training's, all stages at once, forward and with its backward, and the
sampler's: the newest stage's queries over all keys. Peers that know no block-causal mask get a call
for each stage, over the keys that it sees.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, peers
from benchmarks.gpu import rates
from benchmarks.gpu.timing import Timer, interleave
from benchmarks.gpu.work import Work, served
from benchmarks.results import duration
from ecar_kernels.costs import BACKWARD_READS, Rates, backward_cost, cost, floor_seconds
from ecar_kernels.registry import FAMILIES, BackendUnavailableError, resolve
from ecar_kernels.testing import tensors

DTYPE = torch.bfloat16
MAX_SETS = 256
WHOLE = ("L", "L-512px", "L-1024px", cases.VAR, "S", "B")  # 336, 1,344, 5,440 and 680 tokens
COMPILED = "compiled"


class Arena(cases.Arena):
    """Random numbers on the device that inputs are cut from."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        with torch.device(device):
            super().__init__(size, dtype)


def attention(work: Work) -> None:
    """Training's whole attentions first, then the sampler's, then what has to be compiled."""
    rates.run(work)
    eager = [*_whole(work), *_newest(work, FAMILIES["stage_attention"])]
    _rows(work, eager)
    _rows(work, _whole(work)[-1 if work.dry else 0 :], compiled=True)


def others(work: Work) -> None:
    """The adaLN family forward and with its backward, the flow step, the flow block's products."""
    _rows(
        work,
        [
            *_family(work, "adaln"),
            *_newest(work, FAMILIES["flow_step"]),
            *_family(work, "flow_block"),
        ],
    )
    _rows(
        work,
        [
            case
            for case in _family(work, "adaln")
            if case.batch == 1 and (work.dry or case.size == "L")
        ][: 1 if work.dry else None],
        compiled=True,
    )


def warm_items(work: Work) -> Iterator[tuple[str, Callable[[], object]]]:
    """One call of each case that Triton serves."""
    for case in [
        *_whole(work),
        *_newest(work, FAMILIES["stage_attention"]),
        *_family(work, "adaln"),
        *_family(work, "flow_block"),
    ]:
        if "triton" in (found := _ours(work, case)):
            yield case.name, lambda case=case, function=found["triton"]: _warm(work, case, function)


def _warm(work: Work, case: cases.Case, function: Callable) -> None:
    with torch.set_grad_enabled(case.backward):
        arena = Arena(2**24, DTYPE, work.device)
        _call(case, function, next(_inputs(case, arena, work.device, 0)))()


def _rows(work: Work, chosen: list[cases.Case], *, compiled: bool = False) -> None:
    arena = Arena(2**22 if work.dry else 2**30, DTYPE, work.device)
    for case in chosen:
        name = f"{case.name}, {COMPILED}" if compiled else case.name
        if not work.begins(name, 15 if compiled else 2):
            continue
        with torch.set_grad_enabled(case.backward):
            _measure(work, name, case, arena, _variants(work, case, compiled))


def _variants(work: Work, case: cases.Case, compiled: bool) -> dict[str, Callable]:
    """Ours and eager peers; or what torch.compile has to make first, next to ours."""
    ours = _ours(work, case)
    others = peers.functions(case.op, per_stage=True)
    flex = others.pop("FlexAttention", None)
    if not compiled:
        return {**ours, **others}
    torch._dynamo.reset()
    last = dict(list(ours.items())[-1:])
    if flex is not None:
        return {"FlexAttention": flex, **last}
    return {
        "torch.compile": torch.compile(ours["reference"], fullgraph=True, dynamic=False),
        **last,
    }


def _whole(work: Work) -> list[cases.Case]:
    """All stages at once, forward and backward, at batch 1, and E-CAR-L's at 32."""
    if work.dry:
        return [
            cases.Case("stage_attention", 16, 1, "S", backward, whole=not backward)
            for backward in (False, True)
        ]
    one = [case for size in WHOLE for case in cases.attention(size)]
    return [*one, *(dataclasses.replace(case, batch=32) for case in cases.attention("L"))]


def _newest(work: Work, ops: tuple[str, ...]) -> list[cases.Case]:
    """The sampler's calls: E-CAR's stages, the longest first, larger images' and VAR's."""
    if work.dry:
        return [
            *(cases.Case(op, 16, 1, "-" if op in cases.WIDTHLESS else "S") for op in ops),
            *(cases.Case(op, 9, 1, cases.VAR) for op in ops if op not in cases.WIDTHLESS),
        ]
    found = sorted(
        cases.select(forward=(1, 8, 64), ops=ops),
        key=lambda case: (case.batch, "-LSB".index(case.size), -case.tokens),
    )
    larger = [case for pixels in (1024, 512) for case in cases.large(pixels)]
    return [
        case
        for case in [*found, *larger, *reversed(cases.var())]
        if case.op in ops and not case.backward
    ]


def _family(work: Work, family: str) -> list[cases.Case]:
    """A family's ops at E-CAR's stages, forward and, where they have one, backward."""
    if work.dry:
        return [
            cases.Case(op, 16, 1, "S", backward)
            for op in FAMILIES[family]
            for backward in (False, True)
            if not backward or op in BACKWARD_READS
        ]
    found = cases.select(forward=(1, 8, 64), backward=(1, 8, 64), ops=FAMILIES[family])
    return sorted(
        found,
        key=lambda case: (case.tokens != 256, case.batch, "LSB".index(case.size), case.backward),
    )


def _width(case: cases.Case) -> int:
    if case.size == "-":
        return 0
    return case.width // case.heads if case.op == "stage_attention" else case.width


def _ours(work: Work, case: cases.Case) -> dict[str, Callable]:
    """The op by backend, the reference first and what "auto" takes last."""
    found = {}
    for name in ("reference", "native", "triton"):
        try:
            found[name] = resolve(
                case.op, device=work.device, dtype=DTYPE, width=_width(case), backend=name
            )
        except BackendUnavailableError:
            continue
    return found


def _inputs(
    case: cases.Case, arena: Arena, device: torch.device, cache: int
) -> Iterator[dict[str, Any]]:
    size, sets = 0, 0
    while sets < 2 or (size < 3 * cache and sets < MAX_SETS):
        given = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in cases.inputs(case, arena).items()
        }
        if "device" in given:
            given["device"] = device
        yield given
        sets += 1
        size += sum(
            value.numel() * value.element_size()
            for value in given.values()
            if isinstance(value, Tensor)
        )


def _call(case: cases.Case, function: Callable, given: dict[str, Any]) -> Callable[[], object]:
    """Forward, or forward with its backward, which a CUDA graph can hold only together."""
    if not case.backward:
        return lambda: function(**given)
    leaves = {
        name: value.detach().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    wanted = [value for value in leaves.values() if isinstance(value, Tensor)]
    like = "q" if case.op == "stage_attention" else "x"
    gradient = torch.randn_like(given[like])  # of each output, all of one shape

    def call() -> object:
        outputs = tensors(function(**leaves))
        return torch.autograd.grad(outputs, wanted, [gradient] * len(outputs), allow_unused=True)

    return call


def _measure(
    work: Work, name: str, case: cases.Case, arena: Arena, variants: dict[str, Callable]
) -> None:
    sets = list(_inputs(case, arena, work.device, work.cache_bytes))
    timers, failed = {}, {}
    for variant, function in variants.items():

        def add(variant: str = variant, function: Callable = function) -> None:
            timers[variant] = Timer([_call(case, function, given) for given in sets])

        if (reason := peers.why_not(add)) is not None:  # a cell that says so
            failed[variant] = reason
    row: dict[str, Any] = {
        "op": case.op,
        "size": case.size,
        "tokens": case.tokens,
        "batch": case.batch,
        "group": (
            "forward and backward"
            if case.backward
            else "training forward"
            if case.whole
            else "eager"
        ),
        "sets": len(sets),
        "served": served(case.op, work.device, DTYPE, _width(case)),
        "failed": failed,
    }
    if timers:
        row["variants"] = interleave(timers, work.span(0.05))
    with torch.no_grad():
        outputs = _outputs(case, sets[0])
    least = cost(case.op, sets[0], outputs)
    if case.backward:
        least += backward_cost(case.op, sets[0], outputs)
    row |= {"bytes": least.bytes, "multiply_adds": least.multiply_adds}
    if {"copy", "bfloat16"} <= work.rates.keys():
        row["floor"] = floor_seconds(least, Rates(work.rates["copy"], work.rates["bfloat16"]))
    # One of ours that fails is a failure; a peer's is its reason.
    bad = [variant for variant in failed if variant in ("reference", "native", "triton")]
    said = ", ".join(
        f"{variant} {duration(found['median'])}"
        for variant, found in row.get("variants", {}).items()
    )
    work.add(name, said, ok=not bad, **row)


def _outputs(case: cases.Case, given: dict[str, Any]) -> Any:
    """Of the sizes alone where that can be: a whole attention's scores may be large."""
    if case.op == "stage_attention":
        return torch.empty_like(given["q"])
    device = next(value.device for value in given.values() if isinstance(value, Tensor))
    return resolve(case.op, device=device, dtype=DTYPE, backend="reference")(**given)

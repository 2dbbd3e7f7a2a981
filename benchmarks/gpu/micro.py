"""Every op at the stages of models against PyTorch and others (`benchmarks.peers`), bfloat16.

Inputs of each repeat are other tensors, together larger than the last-level cache where 256 sets
are enough. Attention is the sampler's (the newest stage's queries over all keys) and training's:
all stages at once, of larger images and of VAR-d16, too, and there forward with its backward.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, peers
from benchmarks.gpu.timing import Timer, interleave
from benchmarks.gpu.work import Work
from ecar_kernels.costs import Rates, backward_cost, cost, floor_seconds
from ecar_kernels.registry import OPS, BackendUnavailableError, resolve

DTYPE = torch.bfloat16
MAX_SETS = 256
WHOLE = ("L", "L-1024px", cases.VAR, "L-512px", "S", "B")  # at all stages at once, in this order


class Arena(cases.Arena):
    """Random numbers on the device that inputs are cut from."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.randn(size // dtype.itemsize, device=device).to(dtype)
        self.weights = self.values * cases.WEIGHT_SCALE
        self.place = 0


def run(work: Work) -> None:
    """Rows {op, size, tokens, batch, variants}: first without, then with compiled variants."""
    arena = Arena(2**22 if work.dry else 2**30, DTYPE, work.device)
    for case in _cases(work):
        _newest(work, case, arena)
    for case in _whole(work):
        if work.left < 8:
            return
        torch._dynamo.reset()
        group = "forward and backward" if case.backward else "training forward"
        with torch.set_grad_enabled(case.backward):
            _measure(work, case, arena, {**_ours(work, case), **peers.functions(case.op)}, group)
    for case in _larger(work):
        _newest(work, case, arena)
    with torch.no_grad():
        for case in _cases(work)[: 1 if work.dry else None]:
            if case.batch > 1 or work.left < 10:
                continue
            torch._dynamo.reset()
            reference = resolve(case.op, device=work.device, dtype=DTYPE, backend="reference")
            compiled = torch.compile(reference, fullgraph=True, dynamic=False)
            ours = list(_ours(work, case).items())[-1:]
            _measure(work, case, arena, {"torch.compile": compiled, **dict(ours)}, "compiled")


@torch.no_grad()
def _newest(work: Work, case: cases.Case, arena: Arena) -> None:
    """Without what has to be compiled, FlexAttention among it; that comes with training's."""
    if work.left < 3:
        return
    others = peers.functions(case.op)
    others.pop("FlexAttention", None)
    _measure(work, case, arena, {**_ours(work, case), **others}, "eager")


def _cases(work: Work) -> list[cases.Case]:
    if work.dry:
        return [cases.Case(op, 16, 1, "-" if op in cases.WIDTHLESS else "S")
                for op in OPS]
    found = cases.select(forward=(1, 8), ops=OPS)
    return sorted(found, key=lambda case: (case.batch, "-SLB".index(case.size), -case.tokens))


def _larger(work: Work) -> list[cases.Case]:
    """Larger images' last stages, and VAR's stages, the longest first."""
    if work.dry:
        return [cases.Case("adaln", 9, 1, cases.VAR)]
    return [*(case for pixels in (1024, 512) for case in cases.large(pixels)
              if not case.backward), *reversed(cases.var())]


def _whole(work: Work) -> list[cases.Case]:
    """Attention as in training, at batch 1, and E-CAR-L's at 32, too."""
    if work.dry:
        return [cases.Case("stage_attention", 16, 1, "S", backward, whole=True)
                for backward in (False, True)]
    one = [case for size in WHOLE for case in cases.attention(size)]
    return [*one, *(dataclasses.replace(case, batch=32) for case in cases.attention("L"))]


def _ours(work: Work, case: cases.Case) -> dict[str, Callable]:
    """The op by backend, the reference first and what "auto" takes last."""
    found = {}
    width = 0 if case.size == "-" else case.width
    if case.op == "stage_attention":
        width = case.width // case.heads
    for name in ("reference", "native", "triton"):
        try:
            found[name] = resolve(case.op, device=work.device, dtype=DTYPE, width=width,
                                  backend=name)
        except BackendUnavailableError:
            continue
    return found


def _inputs(case: cases.Case, arena: Arena, device: torch.device, cache: int
            ) -> Iterator[dict[str, Any]]:
    size, sets = 0, 0
    while sets < 2 or (size < 3 * cache and sets < MAX_SETS):
        given = {name: value.to(device) if isinstance(value, Tensor) else value
                 for name, value in cases.inputs(case, arena).items()}
        if "device" in given:
            given["device"] = device
        yield given
        sets += 1
        size += sum(value.numel() * value.element_size() for value in given.values()
                    if isinstance(value, Tensor))


def _call(case: cases.Case, function: Callable, given: dict[str, Any]) -> Callable[[], object]:
    """Forward, or forward with its backward, which a CUDA graph can hold only together."""
    if not case.backward:
        return lambda: function(**given)
    leaves = {name: value.detach().requires_grad_() if isinstance(value, Tensor) else value
              for name, value in given.items()}
    wanted = [value for value in leaves.values() if isinstance(value, Tensor)]
    gradient = torch.randn_like(given["q"])
    return lambda: torch.autograd.grad(function(**leaves), wanted, gradient)


def _measure(work: Work, case: cases.Case, arena: Arena, variants: dict[str, Callable],
             group: str) -> None:
    sets = list(_inputs(case, arena, work.device, work.cache_bytes))
    timers, failed = {}, {}
    for name, function in variants.items():
        calls = [_call(case, function, given) for given in sets]

        def add(name: str = name, calls: list = calls) -> None:
            timers[name] = Timer(calls)

        if (reason := peers.why_not(add)) is not None:  # a cell that says so
            failed[name] = reason
    row: dict[str, Any] = {"op": case.op, "size": case.size, "tokens": case.tokens,
                           "batch": case.batch, "group": group, "sets": len(sets)}
    if timers:
        row["variants"] = interleave(timers, work.span(0.05))
    with torch.no_grad():
        outputs = _outputs(case, sets[0])
    least = cost(case.op, sets[0], outputs)
    if case.backward:
        least += backward_cost(case.op, sets[0], outputs)
    row |= {"failed": failed, "bytes": least.bytes, "multiply_adds": least.multiply_adds}
    if {"copy", "bfloat16"} <= work.rates.keys():
        row["floor"] = floor_seconds(least, Rates(work.rates["copy"], work.rates["bfloat16"]))
    work.add(**row)


def _outputs(case: cases.Case, given: dict[str, Any]) -> Any:
    """Of the sizes alone where that can be: a whole attention's scores may be large."""
    if case.op == "stage_attention":
        return torch.empty_like(given["q"])
    device = next(value.device for value in given.values() if isinstance(value, Tensor))
    return resolve(case.op, device=device, dtype=DTYPE, backend="reference")(**given)

"""One op in all ways: the reference in eager mode and compiled, what `auto` takes, and peers."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import Case
from benchmarks.timing import Call
from ecar_kernels.costs import Cost, backward_cost, cost
from ecar_kernels.registry import AUTO_ORDER, FAMILIES, resolve

DTYPE = torch.float32
NAMES = ("eager", "compiled", "ours")
# Ways that hold attention's scores, and how many times at once, as seen of the eager reference.
HOLD_SCORES = ("eager", "compiled", "SDPA math")
SCORES_HELD = {False: 3, True: 6}


def functions(case: Case) -> dict[str, Callable]:
    """Each way's function, with the op's signature; peers are of `benchmarks.peers`."""
    reference = resolve(case.op, device="cpu", dtype=DTYPE, backend="reference")
    # One function has a graph for each shape, and a limit of graphs.
    torch._dynamo.reset()
    compiled = torch.compile(reference, fullgraph=True, dynamic=False)
    ours = resolve(case.op, device="cpu", dtype=DTYPE, width=_width(case))
    return dict(zip(NAMES, (reference, compiled, ours), strict=True)) | peers.functions(case.op)


def backend(case: Case, chosen: Callable) -> str:
    """The name of the backend whose function this is."""
    for name in AUTO_ORDER:
        try:
            if (
                resolve(case.op, device="cpu", dtype=DTYPE, width=_width(case), backend=name)
                is chosen
            ):
                return name
        except RuntimeError:
            continue
    raise AssertionError(f"no backend has the function that serves {case.op}")


def _width(case: Case) -> int:
    if case.size == "-":
        return 0
    return case.width // case.heads if case.op == "stage_attention" else case.width


def calls(case: Case, function: Callable, sets: Sequence[dict[str, Any]]) -> Iterator[Call]:
    """Endless calls with the sets in turn; backward, each comes with its forward just done."""
    for arguments in itertools.cycle(sets):
        if case.backward:
            yield _backward(function, arguments)
        else:
            yield lambda arguments=arguments: _forward(function, arguments)


def why_not(
    case: Case, name: str, function: Callable, sets: Sequence[dict[str, Any]]
) -> str | None:
    """Warms a way up; why it cannot serve the case, in a line, where it cannot.

    Graphs are compiled by one call. Ours packs each set's weights, where the op has weights.
    """
    if name in HOLD_SCORES and (size := _score_bytes(case, sets[0])) > _memory() / 2:
        return f"its scores would take {size / 1e9:.0f} GB"
    count = len(sets) if name == "ours" and case.op in FAMILIES["flow_block"] else 1

    def run() -> None:
        for call in itertools.islice(calls(case, function, sets), count):
            call()

    if name != "ours" and name != "eager":
        return peers.why_not(run)
    run()  # these have no excuse
    return None


def _score_bytes(case: Case, arguments: dict[str, Any]) -> int:
    if case.op != "stage_attention":
        return 0
    q, k = arguments["q"], arguments["k"]
    scores = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] * q.element_size()
    return SCORES_HELD[case.backward] * scores


def _memory() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@torch.no_grad()
def _forward(function: Callable, arguments: dict[str, Any]) -> Any:
    # Not in inference mode, whose tensors have no version: no weight would be packed.
    return function(**arguments)


def _backward(function: Callable, arguments: dict[str, Any]) -> Call:
    given = {
        name: value.detach().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    wanted = [
        value for value in given.values() if isinstance(value, Tensor) and value.requires_grad
    ]
    with torch.enable_grad():
        outputs = _sequence(function(**given))
    gradients = [torch.randn_like(output) for output in outputs]
    # A peer may not know all arguments.
    return lambda: torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)


def case_cost(case: Case, arguments: dict[str, Any]) -> Cost:
    """Bytes and multiply-adds of one call, forward or backward."""
    meta = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    if case.op == "initial_noise":
        outputs = torch.empty(
            len(arguments["seeds"]), *arguments["shape"], dtype=DTYPE, device="meta"
        )
    elif case.op == "upsample_renoise_euler":
        x = meta["x"]
        outputs = (x, x.new_empty(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]))
    else:
        reference = resolve(case.op, device="meta", dtype=DTYPE, backend="reference")
        outputs = reference(**meta)
    return (backward_cost if case.backward else cost)(case.op, meta, outputs)


def _sequence(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs

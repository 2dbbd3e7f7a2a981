"""One op three ways: the reference in eager mode, under torch.compile, and what `auto` takes."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.timing import Call
from ecar_kernels.costs import Cost, backward_cost, cost
from ecar_kernels.registry import AUTO_ORDER, resolve

DTYPE = torch.float32
NAMES = ("eager", "compiled", "ours")


def functions(case: Case) -> dict[str, Callable]:
    """Each way's function, with the op's signature."""
    reference = resolve(case.op, device="cpu", dtype=DTYPE, backend="reference")
    # One function has a graph for each shape, and a limit of graphs.
    torch._dynamo.reset()
    compiled = torch.compile(reference, fullgraph=True, dynamic=False)
    ours = resolve(case.op, device="cpu", dtype=DTYPE, width=_width(case))
    return dict(zip(NAMES, (reference, compiled, ours), strict=True))


def backend(case: Case, chosen: Callable) -> str:
    """The name of the backend whose function this is."""
    for name in AUTO_ORDER:
        try:
            if resolve(case.op, device="cpu", dtype=DTYPE, width=_width(case),
                       backend=name) is chosen:
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


def warm(case: Case, function: Callable, sets: Sequence[dict[str, Any]]) -> None:
    """Every set once: graphs are compiled and weights packed."""
    for call in itertools.islice(calls(case, function, sets), len(sets)):
        call()


@torch.no_grad()
def _forward(function: Callable, arguments: dict[str, Any]) -> Any:
    # Not in inference mode, whose tensors have no version: no weight would be packed.
    return function(**arguments)


def _backward(function: Callable, arguments: dict[str, Any]) -> Call:
    given = {name: value.detach().requires_grad_()
             if isinstance(value, Tensor) and value.is_floating_point() else value
             for name, value in arguments.items()}
    wanted = [value for value in given.values()
              if isinstance(value, Tensor) and value.requires_grad]
    with torch.enable_grad():
        outputs = _sequence(function(**given))
    gradients = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, gradients)


def case_cost(case: Case, arguments: dict[str, Any]) -> Cost:
    """Bytes and multiply-adds of one call, forward or backward."""
    meta = {name: value.to("meta") if isinstance(value, Tensor) else value
            for name, value in arguments.items()}
    if case.op == "initial_noise":
        outputs = torch.empty(len(arguments["seeds"]), *arguments["shape"], dtype=DTYPE,
                              device="meta")
    elif case.op == "upsample_renoise_euler":
        x = meta["x"]
        outputs = (x, x.new_empty(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]))
    else:
        reference = resolve(case.op, device="meta", dtype=DTYPE, backend="reference")
        outputs = reference(**meta)
    return (backward_cost if case.backward else cost)(case.op, meta, outputs)


def _sequence(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs

"""torch.autograd.grad on one thread, for tools/fake_gpu.py: torch's own engine has one for each GPU
that there really is, and none for one that is not."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor


def gradients(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> tuple:
    """As torch.autograd.grad, for leaves: node by node, on this thread."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    grads = (
        [grad_outputs]
        if isinstance(grad_outputs, Tensor) or grad_outputs is None
        else list(grad_outputs)
    )
    if grads == [None]:
        grads = [torch.ones_like(output) for output in outputs]
    waiting: Counter = Counter()  # edges into a node that have not come yet
    seen, stack = set(), [output.grad_fn for output in outputs]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for after, _ in node.next_functions:
            if after is not None:
                waiting[after] += 1
                stack.append(after)
    gathered: dict[Any, dict[int, Tensor]] = {}

    def add(node: Any, slot: int, grad: Tensor | None) -> None:
        slots = gathered.setdefault(node, {})
        if grad is not None:
            slots[slot] = grad if slot not in slots else slots[slot] + grad

    for output, grad in zip(outputs, grads, strict=True):
        add(output.grad_fn, output.output_nr, grad)
    found: dict[int, Tensor] = {}
    ready = [
        node for node in dict.fromkeys(output.grad_fn for output in outputs) if not waiting[node]
    ]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            slots = gathered.pop(node, {})
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                found[id(leaf)] = slots.get(0)
                continue
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            for (after, slot), grad in zip(edges, _backward(node, slots), strict=True):
                add(after, slot, grad)
                waiting[after] -= 1
                if not waiting[after]:
                    ready.append(after)
    return tuple(found.get(id(leaf)) for leaf in inputs)


def _backward(node: Any, slots: dict[int, Tensor]) -> list[Tensor | None]:
    """What a node makes of its outputs' gradients, for those of its inputs that have an edge."""
    given = [slots.get(slot) for slot in range(len(node._input_metadata))]
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        made = node(*given)
        made = made if isinstance(made, tuple) else (made,)
        return [
            grad
            for grad, (after, _) in zip(made, node.next_functions, strict=False)
            if after is not None
        ]
    given = [
        torch.zeros(its.shape, dtype=its.dtype, device=its.device) if grad is None else grad
        for grad, its in zip(given, node._input_metadata, strict=True)
    ]
    made = node.apply(*given)
    made = made if isinstance(made, tuple) else (made,)
    return [grad for grad, needed in zip(made, node.needs_input_grad, strict=True) if needed]

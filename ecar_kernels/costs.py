"""What a call of an op must cost at least: bytes, multiply-adds, and the time they imply.

A roofline. No backend can finish before the memory has moved every argument and result once,
nor before the multiply-adds of the matrix products are done; which of the two is longer is the
floor that a measured time is held against.

    floor = max(bytes / bytes per second, multiply-adds / multiply-adds per second)

Only sizes are read, so that tensors on the meta device do.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ecar_kernels.registry import OPS, RECORDS

# The arguments that a backward reads, in addition to the gradients of the outputs.
BACKWARD_READS = {
    name: op.cost.backward_reads
    for name, op in RECORDS.items()
    if op.cost.backward_reads is not None
}


@dataclass(frozen=True)
class Cost:
    """Bytes that move and multiply-adds of the matrix products (one is two FLOPs)."""

    bytes: int
    multiply_adds: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.multiply_adds + other.multiply_adds)


@dataclass(frozen=True)
class Rates:
    """What a device was measured to do: of a copy, read and written bytes; of a GEMM."""

    bytes_per_second: float
    multiply_adds_per_second: float


def floor_seconds(cost: Cost, rates: Rates) -> float:
    """The time that nothing can beat whose data comes from memory."""
    return max(
        cost.bytes / rates.bytes_per_second, cost.multiply_adds / rates.multiply_adds_per_second
    )


def cost(op: str, arguments: Mapping[str, Any], outputs: Tensor | Sequence[Tensor]) -> Cost:
    """A call's cost, forward.

    op: a name out of `registry.OPS`. arguments: the call's, by the names of the op's signature;
    what is no tensor is free. outputs: what it returned. Every tensor is read or written once,
    a broadcast one at its own size. Elementwise arithmetic is free; the multiply-adds of matrix
    products are those of the op's record.

    Raises ValueError for an unknown op.
    """
    _check(op)
    return Cost(_bytes((*arguments.values(), *_sequence(outputs))), _multiply_adds(op, arguments))


def backward_cost(
    op: str, arguments: Mapping[str, Any], outputs: Tensor | Sequence[Tensor]
) -> Cost:
    """The cost of the gradients of every floating tensor argument, given those of the outputs.

    Arguments as for `cost`. What the gradients need is read once, they are written once. A
    gradient that is another tensor unchanged (x's of `gated_residual`, a token-wise shift's of
    `adaln`) is free. stage_attention has 2.5 times its forward's multiply-adds. Raises
    ValueError for an unknown op, and for one without a backward.
    """
    _check(op)
    its = RECORDS[op].cost
    if its.backward_reads is None:
        raise ValueError(f"argument 'op': expected one with a backward, got {op!r}")
    given = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    results = _sequence(outputs)
    read = [given[name] for name in its.backward_reads if name in given]
    written = [
        value
        for name, value in given.items()
        if value.is_floating_point() and not (name in its.free and value.shape == results[-1].shape)
    ]
    if its.reads_output:
        read.append(results[0])
    return Cost(
        _bytes((*read, *results, *written)),
        round(its.backward_products * _multiply_adds(op, arguments)),
    )


def _check(op: str) -> None:
    if op not in OPS:
        raise ValueError(f"argument 'op': expected one of {', '.join(OPS)}, got {op!r}")


def _sequence(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _bytes(values: Iterable[Any]) -> int:
    return sum(
        _elements(value) * value.element_size() for value in values if isinstance(value, Tensor)
    )


def _elements(tensor: Tensor) -> int:
    """Those in memory: a dimension of stride 0 is one element expanded."""
    return math.prod(
        size if stride else min(size, 1)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _multiply_adds(op: str, arguments: Mapping[str, Any]) -> int:
    record = RECORDS[op]
    return record.cost.multiply_adds(record.sizes(arguments), arguments)

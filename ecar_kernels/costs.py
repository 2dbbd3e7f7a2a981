"""What a call of an op must cost at least: bytes, multiply-adds, and the time they imply.

A roofline. No backend can finish before the memory has moved every argument and result once,
nor before the multiply-adds of the matrix products are done; which of the two is longer is the
floor that a measured time is held against.

    floor = max(bytes / bytes per second, multiply-adds / multiply-adds per second)

Only sizes are read, so that tensors on the meta device do.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ecar_kernels.registry import FAMILIES, OPS

ATTENTION_BACKWARD = 2.5  # q k^T anew, and four products for dq, dk, dv and the scores' gradient


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
    a broadcast one at its own size. Elementwise arithmetic is free. Multiply-adds:

        stage_attention                      2 B H D (visible pairs of a query and a key)
        adaln_linear, linear_gated_residual  B N C K
        flow_boundary                        R N C P + B N P C
        all others                           0

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
    if op not in BACKWARD_READS:
        raise ValueError(f"argument 'op': expected one with a backward, got {op!r}")
    given = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    results = _sequence(outputs)
    read = [given[name] for name in BACKWARD_READS[op] if name in given]
    written = [
        value
        for name, value in given.items()
        if value.is_floating_point() and not _is_free(op, name, value, results)
    ]
    if op == "stage_attention" or op == "gated_residual_adaln":
        read.append(results[0])  # the softmax's output, and the stream that LN was taken of
    return Cost(
        _bytes((*read, *results, *written)),
        round(ATTENTION_BACKWARD * _multiply_adds(op, arguments)),
    )


# The arguments that a backward reads, beside the gradients of the outputs.
BACKWARD_READS = {
    "stage_attention": ("q", "k", "v"),
    "adaln": ("x", "scale", "step_scale"),
    "gated_residual": ("branch", "gate", "step_gate"),
    "gated_residual_adaln": ("branch", "gate", "scale", "step_gate", "step_scale"),
    "euler_step": (),
    "upsample_renoise_euler": (),
}


def _check(op: str) -> None:
    if op not in OPS:
        raise ValueError(f"argument 'op': expected one of {', '.join(OPS)}, got {op!r}")


def _is_free(op: str, name: str, value: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Is the argument's gradient the very gradient of an output?"""
    if op in ("gated_residual", "euler_step"):
        return name == "x"
    return op in FAMILIES["adaln"] and name == "shift" and value.shape == outputs[-1].shape


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
    if op == "stage_attention":
        batch, queries, heads, head_dim = arguments["q"].shape
        return 2 * batch * heads * head_dim * _pairs(arguments["stage_lengths"], queries)
    if op in FAMILIES["flow_block"]:
        tokens = arguments["x" if op == "adaln_linear" else "h"]
        return math.prod(tokens.shape[:-1]) * arguments["weight"].numel()
    if op == "flow_boundary":
        rows = arguments["x"].shape[0] + arguments["state"].shape[0]
        return rows * arguments["x"].shape[1] * arguments["weight"].numel()
    return 0


def _pairs(stage_lengths: Sequence[int], queries: int) -> int:
    """Visible pairs of the last `queries` of the stages' tokens and all keys."""
    ends = itertools.accumulate(stage_lengths)
    first = sum(stage_lengths) - queries
    return sum(length * end for length, end in zip(stage_lengths, ends, strict=True) if end > first)

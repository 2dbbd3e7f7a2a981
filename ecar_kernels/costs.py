"""What a call of an op must cost at least: bytes, multiply-adds, and the time they imply.

A roofline. No backend can finish before the memory has moved every argument and result once,
nor before the multiply-adds of the matrix products are done; which of the two is longer is the
floor that a measured time is held against.

    floor = max(bytes / bytes per second, multiply-adds / multiply-adds per second)

`expected_seconds` is what one launch on a GPU of published figures should take, with what it costs
to launch and the multiprocessors that its programs leave idle: a prediction, no floor.

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


@dataclass(frozen=True)
class Chip:
    """A GPU as its maker publishes it.

    clock: boost, in Hz. rates: of the memory, and of dense bfloat16 products summed in float32.
    shared_bytes: of a block, at most. registers: of a multiprocessor.
    """

    name: str  # as the driver has it
    architecture: int  # 80, 90, 100, 120
    multiprocessors: int
    shared_bytes: int
    clock: float
    rates: Rates
    registers: int = 65536

    @property
    def capability(self) -> tuple[int, int]:
        return divmod(self.architecture, 10)


def _chip(name: str, arch: int, sms: int, kib: int, mhz: int, gb: float, tflops: float) -> Chip:
    return Chip(name, arch, sms, kib << 10, 1e6 * mhz, Rates(1e9 * gb, 0.5e12 * tflops))


# NVIDIA's datasheets: A100 80 GB SXM, L4, H100 SXM, H200 SXM, HGX B200; the whitepaper of GeForce
# Blackwell. Shared memory: CUDA C++ Programming Guide, compute capabilities.
CHIPS = {
    chip.name: chip
    for chip in (
        _chip("NVIDIA A100-SXM4-80GB", 80, 108, 163, 1410, 2039, 312),
        _chip("NVIDIA L4", 89, 58, 99, 2040, 300, 121),
        _chip("NVIDIA H100 80GB HBM3", 90, 132, 227, 1830, 3350, 989),
        _chip("NVIDIA H200", 90, 132, 227, 1830, 4800, 989),
        _chip("NVIDIA B200", 100, 148, 227, 1860, 8000, 2250),
        _chip("NVIDIA GeForce RTX 5090", 120, 170, 99, 2407, 1792, 209.5),
    )
}
# From one kernel of a CUDA graph to the next, measured on an H100 by Hazy Research ("Look Ma, No
# Bubbles!", 2025).
LAUNCH_SECONDS = 1.3e-6
# A read that misses the L2 cache takes 470 to 540 cycles on A100, H100 and RTX 4090 (Luo et al.
# 2024, arXiv 2402.13499). Of a launch's some follow one another: arguments, what they point to, a
# second operand or sum, and the results on their way out.
READ_CYCLES, READS_IN_A_ROW = 500, 4
# What a multiprocessor takes from the L2 cache in a cycle (NVIDIA A100 whitepaper; the same since).
MULTIPROCESSOR_BYTES = 64


def waves(programs: int, chip: Chip) -> int:
    """How many programs the busiest multiprocessor has."""
    return -(-programs // chip.multiprocessors)


def launch_seconds(chip: Chip) -> float:
    """What a launch takes however little it does."""
    return LAUNCH_SECONDS + READS_IN_A_ROW * READ_CYCLES / chip.clock


def expected_seconds(cost: Cost, programs: int | None, chip: Chip) -> float:
    """What one launch takes of a chain of dependent ones, in a CUDA graph: a prediction.

    The time of a launch that does nothing, and the longer of moving its bytes and of multiplying.
    programs: its grid, all of one size; None where they fill the chip. Few programs draw on few
    multiprocessors, and a last wave that is not full leaves some idle. Every byte comes from
    memory and none from a cache; nothing overlaps the launch before.
    """
    rates = chip.rates
    memory, products = rates.bytes_per_second, rates.multiply_adds_per_second
    if programs:
        busy = min(programs, chip.multiprocessors)
        memory = min(memory, busy * MULTIPROCESSOR_BYTES * chip.clock)
        products *= programs / (waves(programs, chip) * chip.multiprocessors)
    return launch_seconds(chip) + floor_seconds(cost, Rates(memory, products))


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
    return Cost(bytes_of((*arguments.values(), *_sequence(outputs))), _multiply_adds(op, arguments))


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
        bytes_of((*read, *results, *written)),
        round(its.backward_products * _multiply_adds(op, arguments)),
    )


def _check(op: str) -> None:
    if op not in OPS:
        raise ValueError(f"argument 'op': expected one of {', '.join(OPS)}, got {op!r}")


def _sequence(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def bytes_of(values: Iterable[Any]) -> int:
    """Of the tensors among them, a broadcast one at its own size."""
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

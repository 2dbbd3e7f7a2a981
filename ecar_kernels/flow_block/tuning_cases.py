"""What `ecar tune` runs of the family, and the launch settings that it tries."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ecar_kernels._triton import product_precision
from ecar_kernels.flow_block import launch
from ecar_kernels.flow_block.record import FAMILY
from ecar_kernels.ops import BoundOp
from ecar_kernels.registry import resolve
from ecar_kernels.testing import tensors
from ecar_kernels.tune import Shape

Run = Callable[[], Sequence[Tensor]]


def candidates(op: str, key: tuple, rows: int, sms: int, arch: int) -> Sequence:
    outputs, inputs, itemsize, precision = key
    normalised = op == "adaln_linear"
    return launch.candidates(rows, outputs, inputs, itemsize, precision, sms, arch, normalised)


def products(width: int, hidden: int) -> Iterator[tuple[str, str, int, int]]:
    """Those of a flow block: layer, op, outputs, inputs."""
    yield "qkv", "adaln_linear", 3 * width, width
    yield "proj", "linear_gated_residual", width, width
    yield "fc1", "adaln_linear", hidden, width
    yield "fc2", "linear_gated_residual", width, hidden


def listed(shape: Shape, dtype: torch.dtype, sms: int, arch: int) -> Iterator[str]:
    """What `launch` chooses for each product, a line each, with its time by the model."""
    itemsize, precision = dtype.itemsize, product_precision(dtype)
    for layer, op, outputs, inputs in products(shape.width, shape.hidden):
        problem = shape.rows, outputs, inputs, itemsize, precision, sms
        its = launch.default(*problem, arch, op == "adaln_linear")
        count = launch.programs(its, shape.rows, outputs)
        time = launch.nanoseconds(its, *problem)
        if op == "adaln_linear" and not its.prologue:
            alone = not launch.shares(its, odd=launch.is_odd(outputs, inputs))
            time += launch.normalising(its, shape.rows, inputs, itemsize, sms, launched=alone)
        yield (
            f"{shape.rows:>6} rows, {inputs:>4} -> {outputs:>4} ({layer}): "
            f"{count} programs of {its.block_m}x{its.block_n}x{its.block_k}, "
            f"{its.num_stages} stages{', which normalise' if its.prologue else ''}: "
            f"{time / 1000:.1f} us"
        )


def runs(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Run]:
    """Each product of a flow block."""
    channels, hidden, rows = shape.width, shape.hidden, shape.rows

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    bound = {
        op.name: resolve(op.name, device=device, dtype=dtype, width=channels, backend="triton")
        for op in FAMILY.ops
    }
    for _, op, outputs, inputs in products(channels, hidden):
        weight, bias = normal(outputs, inputs) * inputs**-0.5, normal(outputs)
        if op == "adaln_linear":
            args = (*(normal(1, rows, channels) for _ in range(3)), weight, bias)
            yield partial(_call, bound[op], *args, activation="gelu_tanh")
        else:
            gate, residual = normal(1, rows, channels), normal(1, rows, channels)
            args = (normal(1, rows, inputs), weight, bias, gate, residual)
            yield partial(_call, bound[op], *args)


def _call(op: BoundOp, *args: Tensor, **options: str) -> Sequence[Tensor]:
    return tensors(op(*args, **options))

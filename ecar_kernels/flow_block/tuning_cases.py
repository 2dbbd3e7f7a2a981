"""What `ecar tune` runs of the family, and the launch settings that it tries."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

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


def runs(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Run]:
    """Each product of a flow block."""
    channels, hidden, rows = shape.width, shape.hidden, shape.rows

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    bound = {
        op.name: resolve(op.name, device=device, dtype=dtype, width=channels, backend="triton")
        for op in FAMILY.ops
    }
    for outputs in (3 * channels, hidden):
        args = (
            *(normal(1, rows, channels) for _ in range(3)),
            normal(outputs, channels) * channels**-0.5,
            normal(outputs),
        )
        yield partial(_call, bound["adaln_linear"], *args, activation="gelu_tanh")
    for inputs in (channels, hidden):
        args = (
            normal(1, rows, inputs),
            normal(channels, inputs) * inputs**-0.5,
            normal(channels),
            normal(1, rows, channels),
            normal(1, rows, channels),
        )
        yield partial(_call, bound["linear_gated_residual"], *args)


def _call(op: BoundOp, *args: Tensor, **options: str) -> Sequence[Tensor]:
    return tensors(op(*args, **options))

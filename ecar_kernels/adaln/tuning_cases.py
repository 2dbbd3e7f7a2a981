"""What `ecar tune` runs of the family, and the launch settings that it tries."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ecar_kernels.adaln import launch
from ecar_kernels.registry import resolve
from ecar_kernels.testing import tensors
from ecar_kernels.tune import Shape

Run = Callable[[], Sequence[Tensor]]


def candidates(op: str, key: tuple, rows: int, sms: int, arch: int) -> Sequence:
    return launch.candidates(op, key[0], rows, arch)


def runs(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Run]:
    """Each op forward and backward."""

    def normal(rows: int) -> Tensor:
        return torch.randn(1, rows, shape.width, dtype=dtype, device=device, requires_grad=True)

    for op, count in (("adaln", 3), ("gated_residual", 3), ("gated_residual_adaln", 5)):
        function = resolve(op, device=device, dtype=dtype, width=shape.width, backend="triton")
        inputs = [normal(shape.rows) for _ in range(count)]
        # As in training: one modulation for each token, and one for the step.
        step = normal(1)
        steps = {"step_gate" if op == "gated_residual" else "step_scale": step}

        def forward(function=function, inputs=inputs, steps=steps):
            with torch.no_grad():
                return tensors(function(*inputs, **steps))

        outputs = tensors(function(*inputs, **steps))
        gradients = [torch.randn_like(output) for output in outputs]

        def backward(outputs=outputs, inputs=(*inputs, step), gradients=gradients):
            return torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)

        yield forward
        yield backward

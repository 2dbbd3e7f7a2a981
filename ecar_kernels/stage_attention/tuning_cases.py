"""What `ecar tune` runs of the family, and the launch settings that it tries."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ecar_kernels.ops import BoundOp
from ecar_kernels.registry import resolve
from ecar_kernels.stage_attention import launch, measured
from ecar_kernels.testing import tensors
from ecar_kernels.tune import Shape

Run = Callable[[], Sequence[Tensor]]


def candidates(op: str, key: tuple, rows: int, sms: int, arch: int) -> Sequence:
    head_dim, kind = key[:2]
    if op == measured.OP:
        return measured.candidates(head_dim, kind, key[2] == "training")
    if op == launch.SHARES:
        return [launch.Shares(1 << power) for power in range(6)]
    return launch.candidates(op, head_dim, kind, arch)


def runs(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Run]:
    """The newest tokens: forward, and both kernels of backward."""
    if not shape.stages:
        return
    function, (q, k, v) = _call(shape, dtype, device, "triton")
    stages = list(shape.stages)

    def forward():
        with torch.no_grad():
            return tensors(function(q, k, v, stages))

    out = function(q, k, v, stages)
    gradient = torch.randn_like(out)

    def backward():
        return torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)

    yield forward
    yield backward


def backend_runs(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Run]:
    """The newest tokens: in inference, and forward and backward, which one backend does both."""
    if not shape.stages:
        return
    function, (q, k, v) = _call(shape, dtype, device, "auto")
    stages, gradient = list(shape.stages), torch.randn_like(q)

    def inference():
        with torch.no_grad():
            return tensors(function(q, k, v, stages))

    def training():
        out = function(q, k, v, stages)
        return (out, *torch.autograd.grad(out, (q, k, v), gradient))

    yield inference
    yield training


def _call(
    shape: Shape, dtype: torch.dtype, device: str, backend: str
) -> tuple[BoundOp, list[Tensor]]:
    """The op, and random q, k and v."""
    head_dim = shape.width // shape.heads
    function = resolve(
        "stage_attention", device=device, dtype=dtype, width=head_dim, backend=backend
    )

    def normal(tokens: int) -> Tensor:
        size = shape.images, tokens, shape.heads, head_dim
        return torch.randn(size, dtype=dtype, device=device, requires_grad=True)

    return function, [normal(shape.tokens), *(normal(sum(shape.stages)) for _ in range(2))]

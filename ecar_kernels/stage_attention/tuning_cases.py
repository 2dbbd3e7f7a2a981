"""What `ecar tune` runs of the family, and the launch settings that it tries."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ecar_kernels.registry import resolve
from ecar_kernels.stage_attention import launch
from ecar_kernels.testing import tensors
from ecar_kernels.tune import Shape

Run = Callable[[], Sequence[Tensor]]


def candidates(op: str, key: tuple, rows: int, sms: int, arch: int) -> Sequence:
    head_dim, kind = key[:2]
    return launch.candidates(op, head_dim, kind, arch)


def runs(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Run]:
    """The newest tokens: forward, and both kernels of backward."""
    if not shape.stages:
        return
    stages, head_dim = list(shape.stages), shape.width // shape.heads
    function = resolve(
        "stage_attention", device=device, dtype=dtype, width=head_dim, backend="triton"
    )

    def normal(tokens: int) -> Tensor:
        size = shape.images, tokens, shape.heads, head_dim
        return torch.randn(size, dtype=dtype, device=device, requires_grad=True)

    q, k, v = normal(shape.tokens), normal(sum(stages)), normal(sum(stages))

    def forward():
        with torch.no_grad():
            return tensors(function(q, k, v, stages))

    out = function(q, k, v, stages)
    gradient = torch.randn_like(out)

    def backward():
        return torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)

    yield forward
    yield backward

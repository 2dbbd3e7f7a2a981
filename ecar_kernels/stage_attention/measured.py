"""Stage attention on CUDA tensors by the backend that `ecar tune` measured to be the fastest.

It serves where no backend is named. Without a measurement for a call, and in graphs of
torch.compile, that is Triton.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecar_kernels import _triton, registry, tuning
from ecar_kernels.ops import BoundOp
from ecar_kernels.stage_attention import launch

OP = "stage_attention_backend"  # as tuning.choose knows it


@dataclass(frozen=True)
class Settings:
    backend: str


USUAL = Settings("triton")


def candidates(head_dim: int, kind: str, training: bool) -> list[Settings]:
    """What can serve here; in training, what gives the same bits at every call."""
    dtype = torch.float32 if kind in ("exact", "tf32") else getattr(torch, kind)
    found = []
    for name, its in registry.IMPLEMENTATIONS["stage_attention"].items():
        varies = training and its.gradients_vary
        if name == "reference" or varies or its.why_not("cuda", dtype) is not None:
            continue
        if its.why_not_width(head_dim) is None:
            found.append(Settings(name))
    return found


def stage_attention(
    q: Tensor, k: Tensor, v: Tensor, stage_lengths: Sequence[int], *, scale: float | None = None
) -> Tensor:
    """q [B, Nq, H, D], k and v [B, N, H, D] -> [B, Nq, H, D]."""
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    run = _serving(q, tuple(stage_lengths), training)
    registry.note("stage_attention", run.backend)
    return run.function(q, k, v, stage_lengths, scale=scale)


def _serving(q: Tensor, stage_lengths: tuple[int, ...], training: bool) -> BoundOp:
    batch, queries, heads, head_dim = q.shape
    kind = launch.kind(q.dtype, _triton.product_precision(q.dtype))
    key = head_dim, kind, "training" if training else "inference", queries, *stage_lengths
    its = tuning.choose(OP, key, batch * heads, USUAL, q.device.index)
    how = q.device.type, q.dtype, head_dim
    try:
        return registry.implementation("stage_attention", *how, backend=its.backend)
    except registry.BackendUnavailableError as error:
        tuning.warn(q.device.index, f"what was measured to be the fastest does not serve: {error}")
        return registry.implementation("stage_attention", *how, backend=USUAL.backend)

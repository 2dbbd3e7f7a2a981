"""What integrations compute blocks with: the halves of an adaLN block, over layers.

With bound ops they are the fused GEMMs. With the public ones the block is trained: then the layers
are called, between the ops around them, and keep less (`ecar_kernels.recompute`). x: [B, N, C].
parts: shift, scale and, of what is added, the gate, [B, 1, C] each. eps: the LayerNorm's.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ecar_kernels import fused, recompute
from ecar_kernels._written import as_written
from ecar_kernels.acceleration import PUBLIC, Ops
from ecar_kernels.fused import rows


def modulation(ops: Ops, module: nn.Module, condition: Tensor) -> Tensor:
    """module(condition), of a SiLU and a linear layer."""
    if (
        ops is PUBLIC
        or not as_written(module, nn.Sequential)
        or len(module) != 2
        or not as_written(module[0], nn.SiLU)
    ):
        return module(condition)
    return fused.linear(ops, module[1], module[0](condition))


def project(
    ops: Ops, x: Tensor, parts: Sequence[Tensor], eps: float, *layers: nn.Module, gelu: bool = False
) -> list[Tensor]:
    """act(layer(LN(x) (1 + scale) + shift)) of each layer, act tanh's GELU or nothing."""
    shift, scale = parts
    if ops is not PUBLIC:
        return [
            rows(fused.adaln_linear(ops, layer, x, shift, scale, gelu=gelu, eps=eps))
            for layer in layers
        ]
    made = recompute.adaln(ops.adaln(x, shift, scale, eps=eps), x, shift, scale, None, None, eps)
    found = [rows(recompute.linear(layer, *made)) for layer in layers]
    return [F.gelu(y, approximate="tanh") for y in found] if gelu else found


def attend(
    ops: Ops,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stages: tuple[int, ...] | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention, [B, N, H, D] each -> [B, N, H D]: of all tokens to all, or to those of their own
    and earlier stages; the keys of the first may come from a cache."""
    stages = stages or (q.shape[1],)
    batch, _, *heads = q.shape
    if not (k.shape == v.shape == (batch, sum(stages), *heads) and q.dtype is k.dtype is v.dtype):
        ops = PUBLIC  # bound ops do not look; the public one says what is wrong
    return ops.stage_attention(rows(q), rows(k), rows(v), stages, scale=scale).flatten(2)


def add(ops: Ops, layer: nn.Module, h: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """x + gate layer(h)."""
    if ops is PUBLIC:
        return ops.gated_residual(x, rows(layer(h)), gate)
    return fused.linear_gated_residual(ops, layer, rows(h), gate, x)[0]


def add_mlp(
    ops: Ops, first: nn.Module, last: nn.Module, x: Tensor, parts: Sequence[Tensor], eps: float
) -> Tensor:
    """x + gate last(GELU(first(LN(x) (1 + scale) + shift))), the GELU tanh's approximation."""
    *modulation, gate = parts
    (hidden,) = project(ops, x, modulation, eps, first, gelu=ops is not PUBLIC)
    if ops is PUBLIC:  # the GELU's input is kept alone
        return ops.gated_residual(x, rows(recompute.gelu_linear(last, hidden)), gate)
    return add(ops, last, hidden, gate, x)

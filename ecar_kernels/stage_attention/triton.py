"""Stage attention on GPUs: the kernels as ops, and their autograd."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ecar_kernels import _triton, tuning
from ecar_kernels.stage_attention import kernels, launch, tiles
from ecar_kernels.stage_attention._autograd import differentiable

LOG2_E = math.log2(math.e)


def stage_attention(q: Tensor, k: Tensor, v: Tensor, stage_lengths: Sequence[int], *,
                    scale: float | None = None) -> Tensor:
    """q [B, Nq, H, D], k and v [B, N, H, D] -> [B, Nq, H, D]."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _StageAttention.apply(q, k, v, stage_lengths, scale)
    return _forward(q, k, v, stage_lengths, scale)[0]


def _run_forward(q: Tensor, k: Tensor, v: Tensor, stage_lengths: list[int],
                 scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _fake_forward(q, k, v, stage_lengths, scale)
    if out.numel():
        _launch(kernels.forward_kernel, "stage_attention", "query", q, k, stage_lengths, scale,
                strided=(q, k, v), tensors=(q, k, v, out, lse), counts=(q.shape[1],),
                scales=(abs(scale) * LOG2_E,))
    return out, lse


def _run_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                  stage_lengths: list[int], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = _fake_backward(grad, q, k, v, out, lse, stage_lengths, scale)
    if not q.numel():
        return grad_q, grad_k, grad_v
    delta = torch.empty_like(lse)
    _run_delta(out, grad, delta)
    read = (q, k, v, grad, lse, delta)
    scales = scale, abs(scale) * LOG2_E
    # Queries first, for they write the delta of few keys.
    for tiles_of in tiles.query_kinds(tuple(stage_lengths), q.shape[1]):
        _launch(kernels.query_gradients_kernel, "stage_attention_queries", tiles_of, q, k,
                stage_lengths, scale, strided=read[:4], tensors=(*read, grad_q),
                counts=(q.shape[1],), scales=scales, FEW_KEYS=tiles_of == "few_keys")
    _launch(kernels.key_gradients_kernel, "stage_attention_keys", "key", q, k, stage_lengths,
            scale, strided=read[:4], tensors=(*read, grad_k, grad_v),
            counts=(q.shape[1], k.shape[1]), scales=scales)
    return grad_q, grad_k, grad_v


def _run_delta(out: Tensor, grad: Tensor, delta: Tensor) -> None:
    batch, queries, heads, head_dim = out.shape
    rows = batch * queries * heads
    unit, strides = _strides((grad,))
    its = launch.delta(head_dim)
    kernels.delta_kernel[(-(-rows // its.rows),)](
        out, grad, delta, *strides, heads, queries, rows, HEAD_DIM=head_dim, WIDTH=its.width,
        UNIT=unit, BLOCK_M=its.rows, num_warps=its.num_warps)


def _launch(kernel, op: str, tiles_of: str, q: Tensor, k: Tensor, stage_lengths: list[int],
            scale: float, *, strided: tuple[Tensor, ...], tensors: tuple[Tensor, ...],
            counts: tuple[int, ...], scales: tuple[float, ...], **constants: bool) -> None:
    """`tiles_of`: the kind of table (tiles.table) of what the kernel's programs own."""
    batch, queries, heads, head_dim = q.shape
    keys, stage_lengths = k.shape[1], tuple(stage_lengths)
    arch = _triton.architecture(q.device.index)
    precision = _triton.product_precision(q.dtype)
    kind = launch.kind(q.dtype, precision)
    unit, strides = _strides(strided)
    if tiles_of == "few_keys":
        its = launch.few_keys(head_dim, kind, arch, aligned=unit > 1)
    elif unit == 1:
        its = launch.unaligned(op, head_dim, kind, arch)
    else:
        usual = launch.default(op, head_dim, kind, stage_lengths, queries, batch * heads, arch,
                               _triton.multiprocessors(q.device.index))
        # The stages, for lists of equal totals have tiles of their own.
        its = tuning.choose(op, (head_dim, kind, queries, *stage_lengths), batch * heads, usual,
                            q.device.index)
    own, other = (its.block_n, queries) if tiles_of == "key" else (its.block_m, keys)
    table = tiles.table(tiles_of, stage_lengths, queries, own, q.device)
    group = launch.heads_in_cache(batch * heads, other, head_dim, q.element_size())
    part1, part2 = launch.parts(head_dim, op, kind)
    kernel[(len(table) * batch * heads,)](
        *tensors, table, *strides, len(table), heads, batch * heads, *counts, group, *scales,
        HEAD_DIM=head_dim, PART1=part1, PART2=part2, UNIT=unit, NEGATIVE=scale < 0,
        PRECISION=precision, RELOAD=launch.reload(op, head_dim, kind, arch),
        BLOCK_M=its.block_m, BLOCK_N=its.block_n, **constants,
        num_warps=its.num_warps, num_stages=its.num_stages,
        maxnreg=launch.max_registers(op, head_dim, kind))


def _strides(tensors: tuple[Tensor, ...]) -> tuple[int, list[int]]:
    """A unit, and the strides of all dimensions but the last in that unit."""
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return unit, [stride // unit for stride in strides]


def _fake_forward(q, k, v, stage_lengths, scale):
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)


def _fake_backward(grad, q, k, v, out, lse, stage_lengths, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_forward = _triton.register(
    "stage_attention(Tensor q, Tensor k, Tensor v, int[] stage_lengths, float scale) "
    "-> (Tensor, Tensor)", _run_forward, _fake_forward)
_backward = _triton.register(
    "stage_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "int[] stage_lengths, float scale) -> (Tensor, Tensor, Tensor)",
    _run_backward, _fake_backward)
_StageAttention = differentiable(_forward, _backward)

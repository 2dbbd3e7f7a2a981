"""Stage attention on GPUs: the kernels as ops, and their autograd."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ecar_kernels import _triton, tuning
from ecar_kernels.stage_attention import autograd, gradient_kernels, kernels, launch, tiles
from ecar_kernels.stage_attention.split_kernels import PAD, split_forward_kernel
from ecar_kernels.stage_attention.unaligned_kernels import (
    unaligned_forward_kernel,
    unaligned_key_gradients_kernel,
    unaligned_query_gradients_kernel,
)

LOG2_E = math.log2(math.e)
# What a program owns tiles of; the kernel for aligned rows, and that for others.
_KERNELS = {
    "stage_attention": ("query", kernels.forward_kernel, unaligned_forward_kernel),
    "stage_attention_keys": (
        "key",
        gradient_kernels.key_gradients_kernel,
        unaligned_key_gradients_kernel,
    ),
    "stage_attention_queries": (
        "query",
        gradient_kernels.query_gradients_kernel,
        unaligned_query_gradients_kernel,
    ),
}


def _run_forward(q: Tensor, k: Tensor, v: Tensor, stage_lengths: list[int], scale: float) -> Tensor:
    out, lse = _results(q)
    if not _launch_split(q, k, v, out, tuple(stage_lengths), scale):
        _launch_forward(q, k, v, out, out, lse, stage_lengths, scale, leave_rest=False)
    return out


def _launch_split(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, stage_lengths: tuple[int, ...], scale: float
) -> bool:
    """Where few queries see many keys, several programs for each tile; else nothing, and False."""
    batch, queries, heads, head_dim = q.shape
    kind = launch.kind(q.dtype, _triton.product_precision(q.dtype))
    its, sms = launch.split(head_dim, kind), _triton.multiprocessors(q.device.index)
    usual = launch.Shares(tiles.shares(stage_lengths, queries, batch * heads, sms))
    unit, strides = _strides((q, k, v))
    if its is None or usual.shares == 1 or unit == 1:
        return False
    key = head_dim, kind, queries, *stage_lengths
    shares = tuning.choose(launch.SHARES, key, batch * heads, usual, q.device.index).shares
    if shares == 1:
        return False
    counters = _triton.counters(q.device, sms)
    if counters is None:
        return False
    part1, part2 = launch.parts(head_dim, "stage_attention", kind)
    room = (shares, batch, heads, queries, head_dim + PAD.value)
    _start(
        split_forward_kernel,
        "query",
        its,
        q,
        k,
        stage_lengths,
        shares,
        tensors=(q, k, v, out, q.new_empty(room, dtype=torch.float32), counters),
        strides=strides,
        counts=(queries,),
        scales=(scale * LOG2_E,),
        HEAD_DIM=head_dim,
        PART1=part1,
        PART2=part2,
        NEGATIVE=scale < 0,
        **_triton.dependent_launch(q.device.index),
    )
    return True


def _run_training(
    q: Tensor, k: Tensor, v: Tensor, stage_lengths: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the logsumexp in base 2, and what rounding to 16 bits took from the output."""
    out, lse, rest = _fake_training(q, k, v, stage_lengths, scale)
    _launch_forward(q, k, v, out, rest, lse, stage_lengths, scale, leave_rest=rest.numel() > 0)
    return out, lse, rest


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    rest: Tensor,
    lse: Tensor,
    stage_lengths: list[int],
    scale: float,
    *,
    leave_rest: bool,
) -> None:
    if out.numel():
        _launch(
            "stage_attention",
            q,
            k,
            stage_lengths,
            strided=(q, k, v),
            tensors=(q, k, v, out, rest, lse),
            counts=(q.shape[1],),
            scales=(scale * LOG2_E,),
            NEGATIVE=scale < 0,
            LEAVE_REST=leave_rest,
            **_triton.dependent_launch(q.device.index),
        )


def _run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    stage_lengths: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = _fake_backward(grad, q, k, v, out, lse, rest, stage_lengths, scale)
    if not q.numel():
        return grad_q, grad_k, grad_v
    delta = torch.empty_like(lse)
    _run_delta(out, rest, grad, delta)
    read = (q, k, v, grad, lse, delta)
    scale_log2 = scale * LOG2_E
    _correct_delta(*read, stage_lengths, scale_log2)
    _launch(
        "stage_attention_keys",
        q,
        k,
        stage_lengths,
        strided=read[:4],
        tensors=(*read, grad_k, grad_v),
        counts=(q.shape[1], k.shape[1]),
        scales=(scale, scale_log2),
        head_dim=q.shape[3],
    )
    _launch(
        "stage_attention_queries",
        q,
        k,
        stage_lengths,
        strided=read[:4],
        tensors=(*read, grad_q),
        counts=(q.shape[1],),
        scales=(scale, scale_log2),
    )
    return grad_q, grad_k, grad_v


def _run_delta(out: Tensor, rest: Tensor, grad: Tensor, delta: Tensor) -> None:
    batch, queries, heads, head_dim = out.shape
    rows = batch * queries * heads
    unit, strides = _strides((grad,))
    its = launch.delta(head_dim)
    gradient_kernels.delta_kernel[(-(-rows // its.rows),)](
        out,
        rest,
        grad,
        delta,
        *strides,
        heads,
        queries,
        rows,
        HEAD_DIM=head_dim,
        WIDTH=its.width,
        UNIT=unit,
        BLOCK_M=its.rows,
        ADD_REST=rest.numel() > 0,
        num_warps=its.num_warps,
    )


def _correct_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    stage_lengths: list[int],
    scale_log2: float,
) -> None:
    """Where it is too inexact, which is where one key may have nearly all the weight.

    In float32, for two products more than the backward's seven. In 16-bit types a sum over the
    output and its rest is as good, but for queries that see so few keys that one often has.
    """
    which = "query" if q.dtype is torch.float32 else "few_keys"
    if which == "few_keys" and not tiles.any_of_few_keys(tuple(stage_lengths), q.shape[1]):
        return
    its = launch.correction(launch.kind(q.dtype, _triton.product_precision(q.dtype)))
    read = q, k, v, grad
    unit, strides = _strides(read)
    _start(
        gradient_kernels.correct_delta_kernel,
        which,
        its,
        q,
        k,
        stage_lengths,
        tensors=(*read, lse, delta),
        strides=strides,
        counts=(q.shape[1],),
        scales=(scale_log2,),
        head_dim=q.shape[3],
        STRIP=its.strip,
        UNIT=unit,
        maxnreg=255,
    )


def _launch(
    op: str,
    q: Tensor,
    k: Tensor,
    stage_lengths: list[int],
    *,
    strided: tuple[Tensor, ...],
    tensors: tuple[Tensor, ...],
    counts: tuple[int, ...],
    scales: tuple[float, ...],
    **constants: int,
) -> None:
    """A kernel that holds whole heads, in parts, under the settings of `op` (launch.OPS); or,
    where rows are not aligned, the one that holds some columns of them."""
    batch, queries, heads, head_dim = q.shape
    lengths = tuple(stage_lengths)
    tiles_of, kernel, unaligned = _KERNELS[op]
    arch = _triton.architecture(q.device.index)
    kind = launch.kind(q.dtype, _triton.product_precision(q.dtype))
    unit, strides = _strides(strided)
    if unit == 1:
        strips = launch.unaligned(op, kind)
        _start(
            unaligned,
            tiles_of,
            strips,
            q,
            k,
            lengths,
            -(-head_dim // strips.columns),
            tensors=tensors,
            strides=strides,
            counts=counts,
            scales=scales,
            COLUMNS=strips.columns,
            STRIP=strips.strip,
            maxnreg=255,
            **constants | {"head_dim": head_dim},
        )
        return
    usual = launch.default(
        op,
        head_dim,
        kind,
        lengths,
        queries,
        batch * heads,
        arch,
        _triton.multiprocessors(q.device.index),
    )
    # The stages, for lists of equal totals have tiles of their own.
    its = tuning.choose(
        op, (head_dim, kind, queries, *lengths), batch * heads, usual, q.device.index
    )
    part1, part2 = launch.parts(head_dim, op, kind)
    if tiles_of == "query":
        constants["PIPELINE_TAIL"] = launch.pipeline_tail(kind, arch, its)
    _start(
        kernel,
        tiles_of,
        its,
        q,
        k,
        lengths,
        tensors=tensors,
        strides=strides,
        counts=counts,
        scales=scales,
        HEAD_DIM=head_dim,
        PART1=part1,
        PART2=part2,
        RELOAD=launch.reload(op, head_dim, kind),
        maxnreg=launch.max_registers(op, head_dim, kind),
        **constants,
    )


def _start(
    kernel,
    tiles_of: str,
    its,
    q: Tensor,
    k: Tensor,
    stage_lengths: Sequence[int],
    parts: int = 1,
    *,
    tensors: tuple[Tensor, ...],
    strides: list[int],
    counts: tuple[int, ...],
    scales: tuple[float, ...],
    **constants: int | None,
) -> None:
    """tiles_of: the kind of table (tiles.table) of what the kernel's programs own; parts: how
    many programs share one row of it."""
    batch, queries, heads, head_dim = q.shape
    own, other = (its.block_n, queries) if tiles_of == "key" else (its.block_m, k.shape[1])
    table = tiles.table(tiles_of, tuple(stage_lengths), queries, own, q.device)
    group = launch.heads_in_cache(batch * heads, other, head_dim, q.element_size())
    kernel[len(table) * batch * heads, parts](
        *tensors,
        table,
        *strides,
        len(table),
        heads,
        batch * heads,
        *counts,
        group,
        *scales,
        PRECISION=_triton.product_precision(q.dtype),
        BLOCK_M=its.block_m,
        BLOCK_N=its.block_n,
        num_warps=its.num_warps,
        num_stages=its.num_stages,
        **constants,
    )


def _strides(tensors: tuple[Tensor, ...]) -> tuple[int, list[int]]:
    """A unit, 1 where some rows are not aligned, and in it the strides of all dimensions but the
    last."""
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    aligned = all(stride % 8 == 0 for stride in strides) and all(
        x.data_ptr() % 16 == 0 for x in tensors
    )
    unit = 8 if aligned else 1
    return unit, [stride // unit for stride in strides]


def _fake_forward(q, k, v, stage_lengths, scale):
    return q.new_empty(q.shape)


def _fake_training(q, k, v, stage_lengths, scale):
    return *_results(q), q.new_empty(0 if q.dtype is torch.float32 else q.shape)


def _fake_backward(grad, q, k, v, out, lse, rest, stage_lengths, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, int[] stage_lengths, float scale"
_forward = _triton.register(f"stage_attention({_ARGUMENTS}) -> Tensor", _run_forward, _fake_forward)
_training = _triton.register(
    f"stage_attention_training({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _run_training,
    _fake_training,
)
_backward = _triton.register(
    "stage_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor rest, int[] stage_lengths, float scale) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
stage_attention = autograd.stage_attention(_forward, _training, _backward)

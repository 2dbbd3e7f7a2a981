"""Stage attention's Triton kernels for rows at any address; kernels.py says what they share.

Where rows do not begin at multiples of 16 bytes, each element is loaded by itself and takes a
register, and whole heads do not fit. Here registers do not depend on the head's width: a program
owns COLUMNS columns of a tile's results, and sums over the head's dimensions are taken STRIP
columns at a time. Wide heads pay for that with scores that are computed once for each COLUMNS.
"""

import triton
import triton.language as tl

from ecar_kernels.stage_attention.gradient_kernels import _scores_and_gradients, _strips, _weights
from ecar_kernels.stage_attention.kernels import (
    COUNTS,
    _begin,
    _dot,
    _locate,
    _row_offsets,
    _rows,
    _softmax,
)


@triton.jit
def _own_columns(COLUMNS: tl.constexpr):
    return tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _load(base, stride, length, columns, head_dim, BLOCK: tl.constexpr):
    """[BLOCK, columns], zero beyond `length` rows and head_dim columns."""
    inside = (tl.arange(0, BLOCK)[:, None] < length) & (columns < head_dim)
    return tl.load(base + _row_offsets(stride, BLOCK) + columns, mask=inside, other=0.0)


@triton.jit
def _store(base, stride, length, value, columns, head_dim, BLOCK: tl.constexpr):
    inside = (tl.arange(0, BLOCK)[:, None] < length) & (columns < head_dim)
    tl.store(
        base + _row_offsets(stride, BLOCK) + columns, value.to(base.dtype.element_ty), mask=inside
    )


@triton.jit(do_not_specialize=COUNTS)
def unaligned_forward_kernel(
    q, k, v, out, rest, lse, table,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head,
    num_tiles, num_heads, batch_heads, queries, group, scale_log2, head_dim,
    COLUMNS: tl.constexpr, STRIP: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEAVE_REST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """As kernels.forward_kernel does."""
    if DEPENDENT:
        _begin()
    image, head, start, length, end = _locate(table, num_tiles, num_heads, batch_heads, group)
    q, q_row = _rows(q, q_image, q_row, q_head, image, head, start, 1)
    k, k_row = _rows(k, k_image, k_row, k_head, image, head, 0, 1)
    v, v_row = _rows(v, v_image, v_row, v_head, image, head, 0, 1)
    columns = _own_columns(COLUMNS)

    acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for at in range(0, end, BLOCK_N):
        left = end - at
        scores = _strips(
            q, q_row, length, k + at * k_row, k_row, left, head_dim,
            STRIP, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        weights, shrink, largest = _softmax(
            scores, largest, left, scale_log2, True, NEGATIVE, BLOCK_N
        )
        total = total * shrink + tl.sum(weights, 1)
        its_v = _load(v + at * v_row, v_row, left, columns, head_dim, BLOCK_N)
        acc = _dot(weights.to(its_v.dtype), its_v, acc * shrink[:, None], PRECISION)

    value = acc / total[:, None]
    at = ((image * queries + start) * num_heads + head) * head_dim
    row = num_heads * head_dim
    _store(out + at, row, length, value, columns, head_dim, BLOCK_M)
    if LEAVE_REST:
        value -= value.to(out.dtype.element_ty).to(tl.float32)
        _store(rest + at, row, length, value, columns, head_dim, BLOCK_M)
    if tl.program_id(1) == 0:
        rows = tl.arange(0, BLOCK_M)
        lse += (image * num_heads + head) * queries + start
        tl.store(lse + rows, largest + tl.log2(total), mask=rows < length)


@triton.jit(do_not_specialize=COUNTS)
def unaligned_key_gradients_kernel(
    q, k, v, grad, lse, delta, grad_k, grad_v, table,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head,
    grad_image, grad_row, grad_head,
    num_tiles, num_heads, batch_heads, queries, keys, group, scale, scale_log2, head_dim,
    COLUMNS: tl.constexpr, STRIP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As gradient_kernels.key_gradients_kernel does."""
    image, head, start, length, first = _locate(table, num_tiles, num_heads, batch_heads, group)
    q, q_row = _rows(q, q_image, q_row, q_head, image, head, 0, 1)
    k, k_row = _rows(k, k_image, k_row, k_head, image, head, start, 1)
    v, v_row = _rows(v, v_image, v_row, v_head, image, head, start, 1)
    grad, grad_row = _rows(grad, grad_image, grad_row, grad_head, image, head, 0, 1)
    lse += (image * num_heads + head) * queries
    delta += (image * num_heads + head) * queries
    columns = _own_columns(COLUMNS)

    total_k = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
    total_v = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
    for at in range(first, queries, BLOCK_M):
        left = queries - at
        q_at = q + at * q_row
        grad_at = grad + at * grad_row
        scores, grad_weights = _scores_and_gradients(
            (k, k_row, v, v_row), (q, q_row, grad, grad_row), at, length, left, head_dim,
            STRIP, BLOCK_N, BLOCK_M, PRECISION,
        )  # fmt: skip
        rows = at + tl.arange(0, BLOCK_M)
        # Queries past the end weigh nothing: 2^(0 - inf).
        row_lse = tl.load(lse + rows, mask=rows < queries, other=float("inf"))
        row_delta = tl.load(delta + rows, mask=rows < queries, other=0.0)
        weights = tl.exp2(tl.fma(scores, scale_log2, -row_lse[None, :]))
        grad_scores = weights * (grad_weights - row_delta[None, :])
        its_grad = _load(grad_at, grad_row, left, columns, head_dim, BLOCK_M)
        total_v = _dot(weights.to(its_grad.dtype), its_grad, total_v, PRECISION)
        its_q = _load(q_at, q_row, left, columns, head_dim, BLOCK_M)
        total_k = _dot(grad_scores.to(its_q.dtype), its_q, total_k, PRECISION)

    at = ((image * keys + start) * num_heads + head) * head_dim
    row = num_heads * head_dim
    _store(grad_k + at, row, length, total_k * scale, columns, head_dim, BLOCK_N)
    _store(grad_v + at, row, length, total_v, columns, head_dim, BLOCK_N)


@triton.jit(do_not_specialize=COUNTS)
def unaligned_query_gradients_kernel(
    q, k, v, grad, lse, delta, grad_q, table,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head,
    grad_image, grad_row, grad_head,
    num_tiles, num_heads, batch_heads, queries, group, scale, scale_log2, head_dim,
    COLUMNS: tl.constexpr, STRIP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As gradient_kernels.query_gradients_kernel does."""
    image, head, start, length, end = _locate(table, num_tiles, num_heads, batch_heads, group)
    q, q_row = _rows(q, q_image, q_row, q_head, image, head, start, 1)
    k, k_row = _rows(k, k_image, k_row, k_head, image, head, 0, 1)
    v, v_row = _rows(v, v_image, v_row, v_head, image, head, 0, 1)
    grad, grad_row = _rows(grad, grad_image, grad_row, grad_head, image, head, start, 1)
    columns = _own_columns(COLUMNS)

    rows = tl.arange(0, BLOCK_M)
    statistics = (image * num_heads + head) * queries + start + rows
    row_lse = tl.load(lse + statistics, mask=rows < length, other=float("inf"))
    row_delta = tl.load(delta + statistics, mask=rows < length, other=0.0)
    total = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    for at in range(0, end, BLOCK_N):
        left = end - at
        k_at = k + at * k_row
        scores, grad_weights = _scores_and_gradients(
            (q, q_row, grad, grad_row), (k, k_row, v, v_row), at, length, left, head_dim,
            STRIP, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        weights = _weights(scores, row_lse, left, scale_log2, BLOCK_N)
        grad_scores = weights * (grad_weights - row_delta[:, None])
        its_k = _load(k_at, k_row, left, columns, head_dim, BLOCK_N)
        total = _dot(grad_scores.to(its_k.dtype), its_k, total, PRECISION)

    grad_q += ((image * queries + start) * num_heads + head) * head_dim
    _store(grad_q, num_heads * head_dim, length, total * scale, columns, head_dim, BLOCK_M)

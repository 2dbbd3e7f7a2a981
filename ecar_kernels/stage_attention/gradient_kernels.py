"""The Triton kernels of stage attention's gradients; kernels.py says what they share."""

import triton
import triton.language as tl

from ecar_kernels.stage_attention.kernels import (
    ALIGNED,
    COUNTS,
    _dot,
    _load,
    _locate,
    _row_offsets,
    _rows,
    _store,
)


@triton.jit(do_not_specialize=COUNTS)
def delta_kernel(
    out, rest, grad, delta, grad_image, grad_row, grad_head, num_heads, queries, all_rows,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
    ADD_REST: tl.constexpr,
):  # fmt: skip
    """delta [B, H, Nq] = sum over D of (out + rest) * grad; out and rest [B, Nq, H, D]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // num_heads
    head = row - token * num_heads
    image = token // queries
    query = token - image * queries
    columns = tl.arange(0, WIDTH)[None, :]
    inside = (row < all_rows)[:, None] & (columns < HEAD_DIM)
    at = (image * grad_image + query * grad_row + head * grad_head) * UNIT
    own = row[:, None] * HEAD_DIM + columns
    x = tl.load(out + own, mask=inside, other=0.0).to(tl.float32)
    if ADD_REST:
        x += tl.load(rest + own, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(grad + at[:, None] + columns, mask=inside, other=0.0)
    total = tl.sum(x * y.to(tl.float32), 1)
    tl.store(delta + (image * num_heads + head) * queries + query, total, mask=row < all_rows)


@triton.jit
def _strips(
    own,
    own_row,
    length,
    loop,
    loop_row,
    left,
    head_dim,
    STRIP: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_LOOP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """own loop^T, [BLOCK_OWN, BLOCK_LOOP], STRIP columns at a time: as few registers at any D.

    head_dim is no constant, which LLVM would unroll the loop for, and ptxas then spill.
    """
    total = tl.zeros([BLOCK_OWN, BLOCK_LOOP], tl.float32)
    own += _row_offsets(own_row, BLOCK_OWN)
    loop += _row_offsets(loop_row, BLOCK_LOOP)
    own_inside = tl.arange(0, BLOCK_OWN)[:, None] < length
    loop_inside = tl.arange(0, BLOCK_LOOP)[:, None] < left
    for at in range(0, head_dim, STRIP):
        columns = at + tl.arange(0, STRIP)[None, :]
        inside = columns < head_dim
        a = tl.load(own + columns, mask=own_inside & inside, other=0.0)
        b = tl.load(loop + columns, mask=loop_inside & inside, other=0.0)
        total = _dot(a, tl.trans(b), total, PRECISION)
    return total


@triton.jit
def _scores_and_gradients(
    own, loop, at, length, left, head_dim,
    STRIP: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_LOOP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q k^T and grad v^T, from row `at` of the loop on, by strips.

    own: (q, its row, grad, its row) of a tile of queries; loop: k's and v's likewise. Or the other
    way round, of a tile of keys: then the results are transposed.
    """
    q, q_row, grad, grad_row = own
    k, k_row, v, v_row = loop
    scores = _strips(
        q, q_row, length, k + at * k_row, k_row, left, head_dim,
        STRIP, BLOCK_OWN, BLOCK_LOOP, PRECISION,
    )  # fmt: skip
    gradients = _strips(
        grad, grad_row, length, v + at * v_row, v_row, left, head_dim,
        STRIP, BLOCK_OWN, BLOCK_LOOP, PRECISION,
    )  # fmt: skip
    return scores, gradients


@triton.jit
def _weights(scores, row_lse, left, scale_log2, BLOCK: tl.constexpr):
    """Of [queries, BLOCK keys], of which `left` exist."""
    weights = tl.exp2(tl.fma(scores, scale_log2, -row_lse[:, None]))
    # 2^(0 - lse) of keys past the end may be infinite, and inf times zero is nan.
    return tl.where(tl.arange(0, BLOCK)[None, :] < left, weights, 0.0)


@triton.jit(do_not_specialize=COUNTS)
def correct_delta_kernel(
    q, k, v, grad, lse, delta, table,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head,
    grad_image, grad_row, grad_head,
    num_tiles, num_heads, batch_heads, queries, group, scale_log2, head_dim,
    STRIP: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta += sum over keys of weight * (its gradient - delta), for one query tile.

    Where one key has nearly all the weight, its weight's gradient less delta is nearly 0, and the
    rounding of a delta that was summed in another way, over the output, is all that is left. This
    sum is of small terms, and what remains is the rounding of delta itself.
    """
    image, head, start, length, end = _locate(table, num_tiles, num_heads, batch_heads, group)
    q, q_row = _rows(q, q_image, q_row, q_head, image, head, start, UNIT)
    k, k_row = _rows(k, k_image, k_row, k_head, image, head, 0, UNIT)
    v, v_row = _rows(v, v_image, v_row, v_head, image, head, 0, UNIT)
    grad, grad_row = _rows(grad, grad_image, grad_row, grad_head, image, head, start, UNIT)

    rows = tl.arange(0, BLOCK_M)
    statistics = (image * num_heads + head) * queries + start + rows
    row_lse = tl.load(lse + statistics, mask=rows < length, other=float("inf"))
    row_delta = tl.load(delta + statistics, mask=rows < length, other=0.0)
    total = tl.zeros([BLOCK_M], tl.float32)
    for at in range(0, end, BLOCK_N):
        left = end - at
        scores, grad_weights = _scores_and_gradients(
            (q, q_row, grad, grad_row), (k, k_row, v, v_row), at, length, left, head_dim,
            STRIP, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        weights = _weights(scores, row_lse, left, scale_log2, BLOCK_N)
        total += tl.sum(weights * (grad_weights - row_delta[:, None]), 1)
    tl.store(delta + statistics, row_delta + total, mask=rows < length)


@triton.jit(do_not_specialize=COUNTS)
def key_gradients_kernel(
    q, k, v, grad, lse, delta, grad_k, grad_v, table,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head,
    grad_image, grad_row, grad_head,
    num_tiles, num_heads, batch_heads, queries, keys, group, scale, scale_log2, head_dim,
    HEAD_DIM: tl.constexpr, PART1: tl.constexpr, PART2: tl.constexpr, PRECISION: tl.constexpr,
    RELOAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of one key tile, over the queries that see it. Everything is transposed,
    [keys, queries], so that the weights are the left factor of both products they go into.
    """
    image, head, start, length, first = _locate(table, num_tiles, num_heads, batch_heads, group)
    q, q_row = _rows(q, q_image, q_row, q_head, image, head, 0, ALIGNED)
    k, k_row = _rows(k, k_image, k_row, k_head, image, head, start, ALIGNED)
    v, v_row = _rows(v, v_image, v_row, v_head, image, head, start, ALIGNED)
    grad, grad_row = _rows(grad, grad_image, grad_row, grad_head, image, head, 0, ALIGNED)
    lse += (image * num_heads + head) * queries
    delta += (image * num_heads + head) * queries

    if not RELOAD:
        k1 = _load(k, k_row, length, 0, PART1, BLOCK_N, True, HEAD_DIM)
        v1 = _load(v, v_row, length, 0, PART1, BLOCK_N, True, HEAD_DIM)
        if PART2 > 0:
            k2 = _load(k, k_row, length, PART1, PART2, BLOCK_N, True, HEAD_DIM)
            v2 = _load(v, v_row, length, PART1, PART2, BLOCK_N, True, HEAD_DIM)
    grad_k1 = tl.zeros([BLOCK_N, PART1], tl.float32)
    grad_v1 = tl.zeros([BLOCK_N, PART1], tl.float32)
    if PART2 > 0:
        grad_k2 = tl.zeros([BLOCK_N, PART2], tl.float32)
        grad_v2 = tl.zeros([BLOCK_N, PART2], tl.float32)
    whole = first + (queries - first) // BLOCK_M * BLOCK_M

    STRIPS: tl.constexpr = RELOAD and RELOAD < PART1
    for BOUNDED in tl.static_range(2):
        for at in tl.range(
            whole if BOUNDED else first, queries if BOUNDED else whole, BLOCK_M, disable_licm=RELOAD
        ):
            left = queries - at
            q_at = q + at * q_row
            grad_at = grad + at * grad_row
            rows = at + tl.arange(0, BLOCK_M)
            if STRIPS:
                scores = _strips(
                    k,
                    k_row,
                    length,
                    q_at,
                    q_row,
                    left,
                    head_dim,
                    RELOAD,
                    BLOCK_N,
                    BLOCK_M,
                    PRECISION,
                )
                grad_weights = _strips(
                    v,
                    v_row,
                    length,
                    grad_at,
                    grad_row,
                    left,
                    head_dim,
                    RELOAD,
                    BLOCK_N,
                    BLOCK_M,
                    PRECISION,
                )
            q1 = _load(q_at, q_row, left, 0, PART1, BLOCK_M, BOUNDED, HEAD_DIM)
            if not STRIPS:
                if RELOAD:
                    k1 = _load(k, k_row, length, 0, PART1, BLOCK_N, True, HEAD_DIM)
                scores = _dot(k1, tl.trans(q1), None, PRECISION)
            if PART2 > 0:
                q2 = _load(q_at, q_row, left, PART1, PART2, BLOCK_M, BOUNDED, HEAD_DIM)
                if RELOAD:
                    k2 = _load(k, k_row, length, PART1, PART2, BLOCK_N, True, HEAD_DIM)
                scores = _dot(k2, tl.trans(q2), scores, PRECISION)
            if BOUNDED:
                # Queries past the end weigh nothing: 2^(0 - inf).
                row_lse = tl.load(lse + rows, mask=rows < queries, other=float("inf"))
                row_delta = tl.load(delta + rows, mask=rows < queries, other=0.0)
            else:
                row_lse = tl.load(lse + rows)
                row_delta = tl.load(delta + rows)
            weights = tl.exp2(tl.fma(scores, scale_log2, -row_lse[None, :]))
            grad1 = _load(grad_at, grad_row, left, 0, PART1, BLOCK_M, BOUNDED, HEAD_DIM)
            if not STRIPS:
                if RELOAD:
                    v1 = _load(v, v_row, length, 0, PART1, BLOCK_N, True, HEAD_DIM)
                grad_weights = _dot(v1, tl.trans(grad1), None, PRECISION)
            low = weights.to(q.dtype.element_ty)
            grad_v1 = _dot(low, grad1, grad_v1, PRECISION)
            if PART2 > 0:
                grad2 = _load(grad_at, grad_row, left, PART1, PART2, BLOCK_M, BOUNDED, HEAD_DIM)
                if RELOAD:
                    v2 = _load(v, v_row, length, PART1, PART2, BLOCK_N, True, HEAD_DIM)
                grad_weights = _dot(v2, tl.trans(grad2), grad_weights, PRECISION)
                grad_v2 = _dot(low, grad2, grad_v2, PRECISION)
            grad_scores = (weights * (grad_weights - row_delta[None, :])).to(q.dtype.element_ty)
            grad_k1 = _dot(grad_scores, q1, grad_k1, PRECISION)
            if PART2 > 0:
                grad_k2 = _dot(grad_scores, q2, grad_k2, PRECISION)

    at = ((image * keys + start) * num_heads + head) * HEAD_DIM
    row = num_heads * HEAD_DIM
    _store(grad_k + at, row, length, grad_k1 * scale, 0, PART1, BLOCK_N, HEAD_DIM)
    _store(grad_v + at, row, length, grad_v1, 0, PART1, BLOCK_N, HEAD_DIM)
    if PART2 > 0:
        _store(grad_k + at, row, length, grad_k2 * scale, PART1, PART2, BLOCK_N, HEAD_DIM)
        _store(grad_v + at, row, length, grad_v2, PART1, PART2, BLOCK_N, HEAD_DIM)


@triton.jit(do_not_specialize=COUNTS)
def query_gradients_kernel(
    q, k, v, grad, lse, delta, grad_q, table,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head,
    grad_image, grad_row, grad_head,
    num_tiles, num_heads, batch_heads, queries, group, scale, scale_log2,
    HEAD_DIM: tl.constexpr, PART1: tl.constexpr, PART2: tl.constexpr, PRECISION: tl.constexpr,
    RELOAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PIPELINE_TAIL: tl.constexpr,
):  # fmt: skip
    """Gradient of one query tile, over the keys that it sees."""
    image, head, start, length, end = _locate(table, num_tiles, num_heads, batch_heads, group)
    q, q_row = _rows(q, q_image, q_row, q_head, image, head, start, ALIGNED)
    k, k_row = _rows(k, k_image, k_row, k_head, image, head, 0, ALIGNED)
    v, v_row = _rows(v, v_image, v_row, v_head, image, head, 0, ALIGNED)
    grad, grad_row = _rows(grad, grad_image, grad_row, grad_head, image, head, start, ALIGNED)

    if not RELOAD:
        q1 = _load(q, q_row, length, 0, PART1, BLOCK_M, True, HEAD_DIM)
        grad1 = _load(grad, grad_row, length, 0, PART1, BLOCK_M, True, HEAD_DIM)
        if PART2 > 0:
            q2 = _load(q, q_row, length, PART1, PART2, BLOCK_M, True, HEAD_DIM)
            grad2 = _load(grad, grad_row, length, PART1, PART2, BLOCK_M, True, HEAD_DIM)
    grad_q1 = tl.zeros([BLOCK_M, PART1], tl.float32)
    if PART2 > 0:
        grad_q2 = tl.zeros([BLOCK_M, PART2], tl.float32)
    rows = tl.arange(0, BLOCK_M)
    statistics = (image * num_heads + head) * queries + start + rows
    row_lse = tl.load(lse + statistics, mask=rows < length, other=float("inf"))
    row_delta = tl.load(delta + statistics, mask=rows < length, other=0.0)
    whole = end // BLOCK_N * BLOCK_N

    for BOUNDED in tl.static_range(2):
        for at in tl.range(
            whole if BOUNDED else 0,
            end if BOUNDED else whole,
            BLOCK_N,
            num_stages=None if PIPELINE_TAIL or not BOUNDED else 1,
            disable_licm=RELOAD,
        ):
            left = end - at
            k_at = k + at * k_row
            v_at = v + at * v_row
            k1 = _load(k_at, k_row, left, 0, PART1, BLOCK_N, BOUNDED, HEAD_DIM)
            v1 = _load(v_at, v_row, left, 0, PART1, BLOCK_N, BOUNDED, HEAD_DIM)
            if RELOAD:
                q1 = _load(q, q_row, length, 0, PART1, BLOCK_M, True, HEAD_DIM)
            scores = _dot(q1, tl.trans(k1), None, PRECISION)
            if RELOAD:
                grad1 = _load(grad, grad_row, length, 0, PART1, BLOCK_M, True, HEAD_DIM)
            grad_weights = _dot(grad1, tl.trans(v1), None, PRECISION)
            if PART2 > 0:
                k2 = _load(k_at, k_row, left, PART1, PART2, BLOCK_N, BOUNDED, HEAD_DIM)
                v2 = _load(v_at, v_row, left, PART1, PART2, BLOCK_N, BOUNDED, HEAD_DIM)
                if RELOAD:
                    q2 = _load(q, q_row, length, PART1, PART2, BLOCK_M, True, HEAD_DIM)
                scores = _dot(q2, tl.trans(k2), scores, PRECISION)
                if RELOAD:
                    grad2 = _load(grad, grad_row, length, PART1, PART2, BLOCK_M, True, HEAD_DIM)
                grad_weights = _dot(grad2, tl.trans(v2), grad_weights, PRECISION)
            weights = tl.exp2(tl.fma(scores, scale_log2, -row_lse[:, None]))
            if BOUNDED:
                # 2^(0 - lse) of keys past the end may be infinite, and inf times zero is nan.
                weights = tl.where(tl.arange(0, BLOCK_N)[None, :] < left, weights, 0.0)
            grad_scores = (weights * (grad_weights - row_delta[:, None])).to(k.dtype.element_ty)
            grad_q1 = _dot(grad_scores, k1, grad_q1, PRECISION)
            if PART2 > 0:
                grad_q2 = _dot(grad_scores, k2, grad_q2, PRECISION)

    grad_q += ((image * queries + start) * num_heads + head) * HEAD_DIM
    row = num_heads * HEAD_DIM
    _store(grad_q, row, length, grad_q1 * scale, 0, PART1, BLOCK_M, HEAD_DIM)
    if PART2 > 0:
        _store(grad_q, row, length, grad_q2 * scale, PART1, PART2, BLOCK_M, HEAD_DIM)

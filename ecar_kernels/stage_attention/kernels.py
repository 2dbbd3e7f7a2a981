"""Stage attention's Triton kernels. No mask: tiles do not straddle stages.

Each program owns one tile of one head of one image. A query tile [start, start + length) of one
stage sees the keys [0, end); a key tile of one stage is seen by the queries [first, Nq). These
bounds come from a table (tiles.py), and only the last, partial block of a loop tests them.

A head of D dimensions is computed in one part, or in two whose widths are powers of two
(launch.parts): 72 as 64 + 16, the upper part zero beyond its 8 columns. Softmax is in base 2:
2^(s c - m) with c = |scale| log2(e); where the scale is negative (NEGATIVE), the side that a
program loads once is negated instead, so that the largest s is always the largest s c. The
logsumexp that the forward leaves for the backward is in base 2 too.

Exact float32 products have no matrix instruction: the compiler spreads a factor's whole rows over
registers, and those of a loop's constant factor for the whole loop, which does not fit. There
RELOAD, the number of columns that go at once, fetches that factor anew (out of the L1 cache) in
each pass. Where that is fewer than a part has, both factors of a sum over the head's dimensions
are fetched strip by strip.

Strides are in units of UNIT elements: a compile-time factor tells the compiler that rows are
aligned where their strides, 72 say, are no multiples of 16.
"""

import triton
import triton.language as tl

from ecar_kernels import _triton

# The interpreter of Triton 3.6 to 3.9 multiplies bfloat16 operands as if their bits were integers.
_INTERPRETED = tl.constexpr(_triton.interpreting())
# Of no use to the compiler, so no reason to compile anew.
COUNTS = ["num_tiles", "num_heads", "batch_heads", "queries", "keys", "all_rows", "group"]


@triton.jit
def _locate(num_tiles, num_heads, batch_heads, group):
    """This program's tile, image and head.

    Tiles come heaviest first, so that light ones fill the end of the grid. Heads go in groups
    whose keys and values stay in the L2 cache while all tiles of the group read them.
    """
    pid = tl.program_id(0)
    first = pid // (group * num_tiles) * group
    size = min(group, batch_heads - first)
    pid -= first * num_tiles
    image_head = (first + pid % size).to(tl.int64)
    image = image_head // num_heads
    return pid // size, image, image_head - image * num_heads


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b, in float32."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _row_offsets(stride, BLOCK: tl.constexpr):
    return tl.arange(0, BLOCK)[:, None].to(tl.int64) * stride


@triton.jit
def _inside(length, OFFSET: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
            BOUNDED: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Mask [BLOCK, WIDTH]: rows before `length` (where BOUNDED), columns of the head."""
    rows = tl.arange(0, BLOCK)[:, None] < length
    columns = OFFSET + tl.arange(0, WIDTH)[None, :] < HEAD_DIM
    if BOUNDED and OFFSET + WIDTH > HEAD_DIM:
        return rows & columns
    elif BOUNDED:
        return rows
    else:
        return columns


@triton.jit
def _load(base, stride, length, OFFSET: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
          BOUNDED: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[BLOCK, WIDTH] from column OFFSET on, zero beyond `length` rows and HEAD_DIM columns."""
    pointers = base + _row_offsets(stride, BLOCK) + (OFFSET + tl.arange(0, WIDTH))[None, :]
    if BOUNDED or OFFSET + WIDTH > HEAD_DIM:
        inside = _inside(length, OFFSET, WIDTH, BLOCK, BOUNDED, HEAD_DIM)
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(base, stride, length, value, OFFSET: tl.constexpr, WIDTH: tl.constexpr,
           BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    pointers = base + _row_offsets(stride, BLOCK) + (OFFSET + tl.arange(0, WIDTH))[None, :]
    inside = _inside(length, OFFSET, WIDTH, BLOCK, True, HEAD_DIM)
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _load_own(base, stride, length, OFFSET: tl.constexpr, WIDTH: tl.constexpr,
              BLOCK: tl.constexpr, NEGATIVE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """What stays the same throughout a program's loop."""
    value = _load(base, stride, length, OFFSET, WIDTH, BLOCK, True, HEAD_DIM)
    if NEGATIVE:
        value = (-value.to(tl.float32)).to(value.dtype)
    return value


@triton.jit
def _strips(own, own_row, length, loop, loop_row, left, STRIP: tl.constexpr,
            BLOCK_OWN: tl.constexpr, BLOCK_LOOP: tl.constexpr, BOUNDED: tl.constexpr,
            NEGATIVE: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr):
    """own loop^T, [BLOCK_OWN, BLOCK_LOOP], of which registers hold STRIP columns at a time."""
    total = tl.zeros([BLOCK_OWN, BLOCK_LOOP], tl.float32)
    for OFFSET in tl.static_range(0, HEAD_DIM, STRIP):
        a = _load_own(own, own_row, length, OFFSET, STRIP, BLOCK_OWN, NEGATIVE, HEAD_DIM)
        b = _load(loop, loop_row, left, OFFSET, STRIP, BLOCK_LOOP, BOUNDED, HEAD_DIM)
        total = _dot(a, tl.trans(b), total, PRECISION)
    return total


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q, k, v, out, lse, table,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head,
    num_tiles, num_heads, batch_heads, queries, group, scale_log2,
    HEAD_DIM: tl.constexpr, PART1: tl.constexpr, PART2: tl.constexpr, UNIT: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, RELOAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T) v of one query tile, and its logsumexp in base 2."""
    tile, image, head = _locate(num_tiles, num_heads, batch_heads, group)
    start = tl.load(table + 3 * tile)
    length = tl.load(table + 3 * tile + 1)
    end = tl.load(table + 3 * tile + 2)
    unit = tl.full([], UNIT, tl.int64)
    q_row, k_row, v_row = q_row * unit, k_row * unit, v_row * unit
    q += (image * q_image + head * q_head) * UNIT + start * q_row
    k += (image * k_image + head * k_head) * UNIT
    v += (image * v_image + head * v_head) * UNIT

    if not RELOAD:
        q1 = _load_own(q, q_row, length, 0, PART1, BLOCK_M, NEGATIVE, HEAD_DIM)
        if PART2 > 0:
            q2 = _load_own(q, q_row, length, PART1, PART2, BLOCK_M, NEGATIVE, HEAD_DIM)
    acc1 = tl.zeros([BLOCK_M, PART1], tl.float32)
    if PART2 > 0:
        acc2 = tl.zeros([BLOCK_M, PART2], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    whole = end // BLOCK_N * BLOCK_N

    for BOUNDED in tl.static_range(2):
        for at in tl.range(whole if BOUNDED else 0, end if BOUNDED else whole, BLOCK_N,
                           disable_licm=RELOAD):
            left = end - at
            k_at = k + at * k_row
            v_at = v + at * v_row
            k1 = _load(k_at, k_row, left, 0, PART1, BLOCK_N, BOUNDED, HEAD_DIM)
            if RELOAD:
                q1 = _load_own(q, q_row, length, 0, PART1, BLOCK_M, NEGATIVE, HEAD_DIM)
            scores = _dot(q1, tl.trans(k1), None, PRECISION)
            if PART2 > 0:
                k2 = _load(k_at, k_row, left, PART1, PART2, BLOCK_N, BOUNDED, HEAD_DIM)
                if RELOAD:
                    q2 = _load_own(q, q_row, length, PART1, PART2, BLOCK_M, NEGATIVE, HEAD_DIM)
                scores = _dot(q2, tl.trans(k2), scores, PRECISION)
            if BOUNDED:
                inside = tl.arange(0, BLOCK_N)[None, :] < left
                scores = tl.where(inside, scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1) * scale_log2)
            weights = tl.exp2(tl.fma(scores, scale_log2, -new_largest[:, None]))
            if BOUNDED:
                # Where scale is zero, -inf times it is nan.
                weights = tl.where(inside, weights, 0.0)
            shrink = tl.exp2(largest - new_largest)
            total = total * shrink + tl.sum(weights, 1)
            largest = new_largest
            weights = weights.to(v.dtype.element_ty)
            v1 = _load(v_at, v_row, left, 0, PART1, BLOCK_N, BOUNDED, HEAD_DIM)
            acc1 = _dot(weights, v1, acc1 * shrink[:, None], PRECISION)
            if PART2 > 0:
                v2 = _load(v_at, v_row, left, PART1, PART2, BLOCK_N, BOUNDED, HEAD_DIM)
                acc2 = _dot(weights, v2, acc2 * shrink[:, None], PRECISION)

    row = image * queries + start
    out += (row * num_heads + head) * HEAD_DIM
    _store(out, num_heads * HEAD_DIM, length, acc1 / total[:, None], 0, PART1, BLOCK_M, HEAD_DIM)
    if PART2 > 0:
        _store(out, num_heads * HEAD_DIM, length, acc2 / total[:, None], PART1, PART2, BLOCK_M,
               HEAD_DIM)
    rows = tl.arange(0, BLOCK_M)
    lse += (image * num_heads + head) * queries + start
    tl.store(lse + rows, largest + tl.log2(total), mask=rows < length)


@triton.jit(do_not_specialize=COUNTS)
def delta_kernel(
    out, grad, delta, grad_image, grad_row, grad_head, num_heads, queries, all_rows,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = sum over D of out * grad, for rows of out [B, Nq, H, D] to delta [B, H, Nq]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // num_heads
    head = row - token * num_heads
    image = token // queries
    query = token - image * queries
    columns = tl.arange(0, WIDTH)[None, :]
    inside = (row < all_rows)[:, None] & (columns < HEAD_DIM)
    at = (image * grad_image + query * grad_row + head * grad_head) * UNIT
    x = tl.load(out + row[:, None] * HEAD_DIM + columns, mask=inside, other=0.0)
    y = tl.load(grad + at[:, None] + columns, mask=inside, other=0.0)
    total = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(delta + (image * num_heads + head) * queries + query, total, mask=row < all_rows)


@triton.jit(do_not_specialize=COUNTS)
def key_gradients_kernel(
    q, k, v, grad, lse, delta, grad_k, grad_v, table,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head,
    grad_image, grad_row, grad_head,
    num_tiles, num_heads, batch_heads, queries, keys, group, scale, scale_log2,
    HEAD_DIM: tl.constexpr, PART1: tl.constexpr, PART2: tl.constexpr, UNIT: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, RELOAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of one key tile, over the queries that see it. Everything is transposed,
    [keys, queries], so that the weights are the left factor of both products they go into.
    """
    tile, image, head = _locate(num_tiles, num_heads, batch_heads, group)
    start = tl.load(table + 3 * tile)
    length = tl.load(table + 3 * tile + 1)
    first = tl.load(table + 3 * tile + 2)
    unit = tl.full([], UNIT, tl.int64)
    q_row, k_row, v_row, grad_row = q_row * unit, k_row * unit, v_row * unit, grad_row * unit
    q += (image * q_image + head * q_head) * UNIT
    k += (image * k_image + head * k_head) * UNIT + start * k_row
    v += (image * v_image + head * v_head) * UNIT + start * v_row
    grad += (image * grad_image + head * grad_head) * UNIT
    lse += (image * num_heads + head) * queries
    delta += (image * num_heads + head) * queries

    if not RELOAD:
        k1 = _load_own(k, k_row, length, 0, PART1, BLOCK_N, NEGATIVE, HEAD_DIM)
        v1 = _load_own(v, v_row, length, 0, PART1, BLOCK_N, False, HEAD_DIM)
        if PART2 > 0:
            k2 = _load_own(k, k_row, length, PART1, PART2, BLOCK_N, NEGATIVE, HEAD_DIM)
            v2 = _load_own(v, v_row, length, PART1, PART2, BLOCK_N, False, HEAD_DIM)
    grad_k1 = tl.zeros([BLOCK_N, PART1], tl.float32)
    grad_v1 = tl.zeros([BLOCK_N, PART1], tl.float32)
    if PART2 > 0:
        grad_k2 = tl.zeros([BLOCK_N, PART2], tl.float32)
        grad_v2 = tl.zeros([BLOCK_N, PART2], tl.float32)
    whole = first + (queries - first) // BLOCK_M * BLOCK_M

    STRIPS: tl.constexpr = RELOAD and RELOAD < PART1
    for BOUNDED in tl.static_range(2):
        for at in tl.range(whole if BOUNDED else first, queries if BOUNDED else whole, BLOCK_M,
                           disable_licm=RELOAD):
            left = queries - at
            q_at = q + at * q_row
            grad_at = grad + at * grad_row
            rows = at + tl.arange(0, BLOCK_M)
            if STRIPS:
                scores = _strips(k, k_row, length, q_at, q_row, left, RELOAD, BLOCK_N, BLOCK_M,
                                 BOUNDED, NEGATIVE, HEAD_DIM, PRECISION)
                grad_weights = _strips(v, v_row, length, grad_at, grad_row, left, RELOAD,
                                       BLOCK_N, BLOCK_M, BOUNDED, False, HEAD_DIM, PRECISION)
            q1 = _load(q_at, q_row, left, 0, PART1, BLOCK_M, BOUNDED, HEAD_DIM)
            if not STRIPS:
                if RELOAD:
                    k1 = _load_own(k, k_row, length, 0, PART1, BLOCK_N, NEGATIVE, HEAD_DIM)
                scores = _dot(k1, tl.trans(q1), None, PRECISION)
            if PART2 > 0:
                q2 = _load(q_at, q_row, left, PART1, PART2, BLOCK_M, BOUNDED, HEAD_DIM)
                if RELOAD:
                    k2 = _load_own(k, k_row, length, PART1, PART2, BLOCK_N, NEGATIVE, HEAD_DIM)
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
                    v1 = _load_own(v, v_row, length, 0, PART1, BLOCK_N, False, HEAD_DIM)
                grad_weights = _dot(v1, tl.trans(grad1), None, PRECISION)
            low = weights.to(q.dtype.element_ty)
            grad_v1 = _dot(low, grad1, grad_v1, PRECISION)
            if PART2 > 0:
                grad2 = _load(grad_at, grad_row, left, PART1, PART2, BLOCK_M, BOUNDED, HEAD_DIM)
                if RELOAD:
                    v2 = _load_own(v, v_row, length, PART1, PART2, BLOCK_N, False, HEAD_DIM)
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
    HEAD_DIM: tl.constexpr, PART1: tl.constexpr, PART2: tl.constexpr, UNIT: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, RELOAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FEW_KEYS: tl.constexpr,
):  # fmt: skip
    """Gradient of one query tile, over the keys that it sees.

    Where these are fewer than a block, FEW_KEYS, delta is taken from their weights and left for
    key_gradients_kernel: where one key has nearly all the weight, its weight's gradient less
    delta is nearly 0, and the rounding of `out` in delta_kernel's would be all that is left.
    """
    tile, image, head = _locate(num_tiles, num_heads, batch_heads, group)
    start = tl.load(table + 3 * tile)
    length = tl.load(table + 3 * tile + 1)
    end = tl.load(table + 3 * tile + 2)
    unit = tl.full([], UNIT, tl.int64)
    q_row, k_row, v_row, grad_row = q_row * unit, k_row * unit, v_row * unit, grad_row * unit
    q += (image * q_image + head * q_head) * UNIT + start * q_row
    k += (image * k_image + head * k_head) * UNIT
    v += (image * v_image + head * v_head) * UNIT
    grad += (image * grad_image + head * grad_head) * UNIT + start * grad_row

    if not RELOAD:
        q1 = _load_own(q, q_row, length, 0, PART1, BLOCK_M, NEGATIVE, HEAD_DIM)
        grad1 = _load_own(grad, grad_row, length, 0, PART1, BLOCK_M, False, HEAD_DIM)
        if PART2 > 0:
            q2 = _load_own(q, q_row, length, PART1, PART2, BLOCK_M, NEGATIVE, HEAD_DIM)
            grad2 = _load_own(grad, grad_row, length, PART1, PART2, BLOCK_M, False, HEAD_DIM)
    grad_q1 = tl.zeros([BLOCK_M, PART1], tl.float32)
    if PART2 > 0:
        grad_q2 = tl.zeros([BLOCK_M, PART2], tl.float32)
    rows = tl.arange(0, BLOCK_M)
    statistics = (image * num_heads + head) * queries + start + rows
    row_lse = tl.load(lse + statistics, mask=rows < length, other=float("inf"))
    row_delta = tl.load(delta + statistics, mask=rows < length, other=0.0)
    whole = end // BLOCK_N * BLOCK_N

    for BOUNDED in tl.static_range(1 if FEW_KEYS else 0, 2):
        for at in tl.range(whole if BOUNDED else 0, end if BOUNDED else whole, BLOCK_N,
                           disable_licm=RELOAD):
            left = end - at
            k_at = k + at * k_row
            v_at = v + at * v_row
            k1 = _load(k_at, k_row, left, 0, PART1, BLOCK_N, BOUNDED, HEAD_DIM)
            v1 = _load(v_at, v_row, left, 0, PART1, BLOCK_N, BOUNDED, HEAD_DIM)
            if RELOAD:
                q1 = _load_own(q, q_row, length, 0, PART1, BLOCK_M, NEGATIVE, HEAD_DIM)
            scores = _dot(q1, tl.trans(k1), None, PRECISION)
            if RELOAD:
                grad1 = _load_own(grad, grad_row, length, 0, PART1, BLOCK_M, False, HEAD_DIM)
            grad_weights = _dot(grad1, tl.trans(v1), None, PRECISION)
            if PART2 > 0:
                k2 = _load(k_at, k_row, left, PART1, PART2, BLOCK_N, BOUNDED, HEAD_DIM)
                v2 = _load(v_at, v_row, left, PART1, PART2, BLOCK_N, BOUNDED, HEAD_DIM)
                if RELOAD:
                    q2 = _load_own(q, q_row, length, PART1, PART2, BLOCK_M, NEGATIVE, HEAD_DIM)
                scores = _dot(q2, tl.trans(k2), scores, PRECISION)
                if RELOAD:
                    grad2 = _load_own(grad, grad_row, length, PART1, PART2, BLOCK_M, False,
                                      HEAD_DIM)
                grad_weights = _dot(grad2, tl.trans(v2), grad_weights, PRECISION)
            weights = tl.exp2(tl.fma(scores, scale_log2, -row_lse[:, None]))
            if BOUNDED:
                # 2^(0 - lse) of keys past the end may be infinite, and inf times zero is nan.
                weights = tl.where(tl.arange(0, BLOCK_N)[None, :] < left, weights, 0.0)
            if FEW_KEYS:
                # Over the weights' sum, which is 1 but for rounding: 1 / sum is 2 - sum.
                row_delta = tl.sum(weights * grad_weights, 1)
                row_delta = tl.fma(row_delta, 1 - tl.sum(weights, 1), row_delta)
                tl.store(delta + statistics, row_delta, mask=rows < length)
            grad_scores = (weights * (grad_weights - row_delta[:, None])).to(k.dtype.element_ty)
            grad_q1 = _dot(grad_scores, k1, grad_q1, PRECISION)
            if PART2 > 0:
                grad_q2 = _dot(grad_scores, k2, grad_q2, PRECISION)

    grad_q += ((image * queries + start) * num_heads + head) * HEAD_DIM
    row = num_heads * HEAD_DIM
    _store(grad_q, row, length, grad_q1 * scale, 0, PART1, BLOCK_M, HEAD_DIM)
    if PART2 > 0:
        _store(grad_q, row, length, grad_q2 * scale, PART1, PART2, BLOCK_M, HEAD_DIM)

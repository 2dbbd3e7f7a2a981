"""Stage attention's forward without gradients, of few queries that see many keys.

Their tiles fill a small part of the chip, so each is given to several programs, which have a share
of its keys each. A program leaves what it has of the running softmax; the last of a tile's programs
to arrive, whichever that is, merges these in the order of the shares: the same bits each time.
"""

import triton
import triton.language as tl

from ecar_kernels.stage_attention.kernels import (
    ALIGNED,
    COUNTS,
    _begin,
    _dot,
    _inside,
    _load,
    _locate,
    _rows,
    _softmax,
    _store,
)

PAD = tl.constexpr(8)  # columns after a head's, of which two are used: rows stay aligned


@triton.jit
def _merged(
    sums, stride, shares, length,
    OFFSET: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The weighted mean of all shares, of some columns of a tile's rows."""
    row = tl.arange(0, BLOCK)
    inside = _inside(length, OFFSET, WIDTH, BLOCK, True, HEAD_DIM)
    sums += row * (HEAD_DIM + PAD)
    columns = (OFFSET + tl.arange(0, WIDTH))[None, :]
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(shares):
        its = tl.load(sums + HEAD_DIM, mask=row < length, other=0.0)
        new_largest = tl.maximum(largest, its)
        shrink, grow = tl.exp2(largest - new_largest), tl.exp2(its - new_largest)
        weight = tl.load(sums + HEAD_DIM + 1, mask=row < length, other=1.0)
        part = tl.load(sums[:, None] + columns, mask=inside, other=0.0)
        total = total * shrink + weight * grow
        acc = acc * shrink[:, None] + part * grow[:, None]
        largest = new_largest
        sums += stride
    return acc / total[:, None]


@triton.jit(do_not_specialize=COUNTS)
def split_forward_kernel(
    q, k, v, out, sums, counters, table,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head,
    num_tiles, num_heads, batch_heads, queries, group, scale_log2,
    HEAD_DIM: tl.constexpr, PART1: tl.constexpr, PART2: tl.constexpr, PRECISION: tl.constexpr,
    NEGATIVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T) v of one query tile, of which programs in y have a share of the
    keys each.

    sums: room for [shares, B, H, Nq, HEAD_DIM + PAD] float32: sums of weighted values, the largest
    exponent, the sum of weights. counters: a zero for each tile, and zero again at the end.
    """
    if DEPENDENT:
        _begin()
    image, head, start, length, end = _locate(table, num_tiles, num_heads, batch_heads, group)
    q, q_row = _rows(q, q_image, q_row, q_head, image, head, start, ALIGNED)
    k, k_row = _rows(k, k_image, k_row, k_head, image, head, 0, ALIGNED)
    v, v_row = _rows(v, v_image, v_row, v_head, image, head, 0, ALIGNED)
    shares = tl.num_programs(1)
    share = tl.cdiv(tl.cdiv(end, BLOCK_N), shares) * BLOCK_N
    begin = tl.program_id(1) * share
    end = tl.minimum(end, begin + share)

    q1 = _load(q, q_row, length, 0, PART1, BLOCK_M, True, HEAD_DIM)
    acc1 = tl.zeros([BLOCK_M, PART1], tl.float32)
    if PART2 > 0:
        q2 = _load(q, q_row, length, PART1, PART2, BLOCK_M, True, HEAD_DIM)
        acc2 = tl.zeros([BLOCK_M, PART2], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for at in range(begin, end, BLOCK_N):
        left = end - at
        k_at, v_at = k + at * k_row, v + at * v_row
        k1 = _load(k_at, k_row, left, 0, PART1, BLOCK_N, True, HEAD_DIM)
        scores = _dot(q1, tl.trans(k1), None, PRECISION)
        if PART2 > 0:
            k2 = _load(k_at, k_row, left, PART1, PART2, BLOCK_N, True, HEAD_DIM)
            scores = _dot(q2, tl.trans(k2), scores, PRECISION)
        weights, shrink, largest = _softmax(
            scores, largest, left, scale_log2, True, NEGATIVE, BLOCK_N
        )
        total = total * shrink + tl.sum(weights, 1)
        weights = weights.to(v.dtype.element_ty)
        v1 = _load(v_at, v_row, left, 0, PART1, BLOCK_N, True, HEAD_DIM)
        acc1 = _dot(weights, v1, acc1 * shrink[:, None], PRECISION)
        if PART2 > 0:
            v2 = _load(v_at, v_row, left, PART1, PART2, BLOCK_N, True, HEAD_DIM)
            acc2 = _dot(weights, v2, acc2 * shrink[:, None], PRECISION)

    width: tl.constexpr = HEAD_DIM + PAD
    stride = batch_heads.to(tl.int64) * queries * width
    sums += ((image * num_heads + head) * queries + start) * width
    own = sums + tl.program_id(1) * stride
    rows = tl.arange(0, BLOCK_M)
    _store(own, width, length, acc1, 0, PART1, BLOCK_M, HEAD_DIM)
    if PART2 > 0:
        _store(own, width, length, acc2, PART1, PART2, BLOCK_M, HEAD_DIM)
    tl.store(own + rows * width + HEAD_DIM, largest, mask=rows < length)
    tl.store(own + rows * width + (HEAD_DIM + 1), total, mask=rows < length)
    counters += tl.program_id(0)
    tl.debug_barrier()  # one thread counts, after the stores of all
    if tl.atomic_add(counters, 1, sem="acq_rel") == shares - 1:
        tl.store(counters, 0)
        out += ((image * queries + start) * num_heads + head) * HEAD_DIM
        row = num_heads * HEAD_DIM
        y = _merged(sums, stride, shares, length, 0, PART1, BLOCK_M, HEAD_DIM)
        _store(out, row, length, y, 0, PART1, BLOCK_M, HEAD_DIM)
        if PART2 > 0:
            y = _merged(sums, stride, shares, length, PART1, PART2, BLOCK_M, HEAD_DIM)
            _store(out, row, length, y, PART1, PART2, BLOCK_M, HEAD_DIM)

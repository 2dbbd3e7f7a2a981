"""Stage attention's Triton kernels. No mask: tiles do not straddle stages.

Each program owns one tile of one head of one image. A query tile [start, start + length) of one
stage sees the keys [0, end); a key tile of one stage is seen by the queries [first, Nq). These
bounds come from a table (tiles.py), and only the last, partial block of a loop tests them.

A head of D dimensions is computed in one part, or in two whose widths are powers of two
(launch.parts): 72 as 64 + 16, the upper part zero beyond its 8 columns. Softmax is in base 2:
2^(s c - m) with c = scale log2(e), which the forward takes the largest s for, or the smallest where
the scale is negative (NEGATIVE). The logsumexp that it leaves for the backward is in base 2 too.

Exact float32 products have no matrix instruction: the compiler spreads a factor's whole rows over
registers, and those of a loop's constant factor for the whole loop, which does not fit. There
RELOAD, the number of columns that go at once, fetches that factor anew (out of the L1 cache) in
each pass. Where that is fewer than a part has, both factors of a sum over the head's dimensions
are fetched strip by strip.

Strides are in units of 8 elements (ALIGNED): a compile-time factor tells the compiler that rows
are aligned where their strides, 72 say, are no multiples of 16. unaligned_kernels.py is for others.
"""

import triton
import triton.language as tl

from ecar_kernels import _triton

# The interpreter of Triton 3.6 to 3.9 multiplies bfloat16 operands as if their bits were integers.
_INTERPRETED = tl.constexpr(_triton.interpreting())
ALIGNED = tl.constexpr(8)
# Of no use to the compiler, so no reason to compile anew.
COUNTS = [
    "num_tiles",
    "num_heads",
    "batch_heads",
    "queries",
    "keys",
    "all_rows",
    "group",
    "head_dim",
]


@triton.jit
def _begin():
    """As flow_block's: what the kernel before this one on the stream writes is there after this."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@triton.jit
def _locate(table, num_tiles, num_heads, batch_heads, group):
    """This program's image and head, and its tile's row of the table.

    Tiles come heaviest first, so that light ones fill the end of the grid. Heads go in groups
    whose keys and values stay in the L2 cache while all tiles of the group read them.
    """
    pid = tl.program_id(0)
    first = pid // (group * num_tiles) * group
    size = min(group, batch_heads - first)
    pid -= first * num_tiles
    image_head = (first + pid % size).to(tl.int64)
    image = image_head // num_heads
    row = table + 3 * (pid // size)
    return (image, image_head - image * num_heads, tl.load(row), tl.load(row + 1), tl.load(row + 2))


@triton.jit
def _rows(x, x_image, x_row, x_head, image, head, first, UNIT: tl.constexpr):
    """Where the head's row `first` is, and the stride of rows in elements."""
    stride = x_row * tl.full([], UNIT, tl.int64)
    return x + (image * x_image + head * x_head) * UNIT + first * stride, stride


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
def _inside(
    length,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
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
def _load(
    base,
    stride,
    length,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUNDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """[BLOCK, WIDTH] from column OFFSET on, zero beyond `length` rows and HEAD_DIM columns."""
    pointers = base + _row_offsets(stride, BLOCK) + (OFFSET + tl.arange(0, WIDTH))[None, :]
    if BOUNDED or OFFSET + WIDTH > HEAD_DIM:
        inside = _inside(length, OFFSET, WIDTH, BLOCK, BOUNDED, HEAD_DIM)
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(
    base,
    stride,
    length,
    value,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    pointers = base + _row_offsets(stride, BLOCK) + (OFFSET + tl.arange(0, WIDTH))[None, :]
    inside = _inside(length, OFFSET, WIDTH, BLOCK, True, HEAD_DIM)
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _softmax(
    scores,
    largest,
    left,
    scale_log2,
    BOUNDED: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of the running softmax: weights [queries, BLOCK keys, of which `left` exist (where
    BOUNDED)], the factor for the sums before it, and the new largest exponent."""
    inside = tl.arange(0, BLOCK)[None, :] < left
    if BOUNDED:
        scores = tl.where(inside, scores, float("inf" if NEGATIVE else "-inf"))
    far = tl.min(scores, 1) if NEGATIVE else tl.max(scores, 1)
    new_largest = tl.maximum(largest, far * scale_log2)
    weights = tl.exp2(tl.fma(scores, scale_log2, -new_largest[:, None]))
    if BOUNDED:
        # Where scale is zero, -inf times it is nan.
        weights = tl.where(inside, weights, 0.0)
    return weights, tl.exp2(largest - new_largest), new_largest


@triton.jit
def _finish(
    out,
    rest,
    stride,
    length,
    value,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LEAVE_REST: tl.constexpr,
):
    _store(out, stride, length, value, OFFSET, WIDTH, BLOCK, HEAD_DIM)
    if LEAVE_REST:
        value -= value.to(out.dtype.element_ty).to(tl.float32)
        _store(rest, stride, length, value, OFFSET, WIDTH, BLOCK, HEAD_DIM)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q, k, v, out, rest, lse, table,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head,
    num_tiles, num_heads, batch_heads, queries, group, scale_log2,
    HEAD_DIM: tl.constexpr, PART1: tl.constexpr, PART2: tl.constexpr, PRECISION: tl.constexpr,
    RELOAD: tl.constexpr, NEGATIVE: tl.constexpr, LEAVE_REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIPELINE_TAIL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T) v of one query tile, and its logsumexp in base 2.

    LEAVE_REST: what rounding took from `out` is left in `rest`, in the same type, for delta_kernel.
    """
    if DEPENDENT:
        _begin()
    image, head, start, length, end = _locate(table, num_tiles, num_heads, batch_heads, group)
    q, q_row = _rows(q, q_image, q_row, q_head, image, head, start, ALIGNED)
    k, k_row = _rows(k, k_image, k_row, k_head, image, head, 0, ALIGNED)
    v, v_row = _rows(v, v_image, v_row, v_head, image, head, 0, ALIGNED)

    if not RELOAD:
        q1 = _load(q, q_row, length, 0, PART1, BLOCK_M, True, HEAD_DIM)
        if PART2 > 0:
            q2 = _load(q, q_row, length, PART1, PART2, BLOCK_M, True, HEAD_DIM)
    acc1 = tl.zeros([BLOCK_M, PART1], tl.float32)
    if PART2 > 0:
        acc2 = tl.zeros([BLOCK_M, PART2], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
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
            if RELOAD:
                q1 = _load(q, q_row, length, 0, PART1, BLOCK_M, True, HEAD_DIM)
            scores = _dot(q1, tl.trans(k1), None, PRECISION)
            if PART2 > 0:
                k2 = _load(k_at, k_row, left, PART1, PART2, BLOCK_N, BOUNDED, HEAD_DIM)
                if RELOAD:
                    q2 = _load(q, q_row, length, PART1, PART2, BLOCK_M, True, HEAD_DIM)
                scores = _dot(q2, tl.trans(k2), scores, PRECISION)
            weights, shrink, largest = _softmax(
                scores, largest, left, scale_log2, BOUNDED, NEGATIVE, BLOCK_N
            )
            total = total * shrink + tl.sum(weights, 1)
            weights = weights.to(v.dtype.element_ty)
            v1 = _load(v_at, v_row, left, 0, PART1, BLOCK_N, BOUNDED, HEAD_DIM)
            acc1 = _dot(weights, v1, acc1 * shrink[:, None], PRECISION)
            if PART2 > 0:
                v2 = _load(v_at, v_row, left, PART1, PART2, BLOCK_N, BOUNDED, HEAD_DIM)
                acc2 = _dot(weights, v2, acc2 * shrink[:, None], PRECISION)

    at = ((image * queries + start) * num_heads + head) * HEAD_DIM
    row = num_heads * HEAD_DIM
    _finish(
        out + at,
        rest + at,
        row,
        length,
        acc1 / total[:, None],
        0,
        PART1,
        BLOCK_M,
        HEAD_DIM,
        LEAVE_REST,
    )
    if PART2 > 0:
        _finish(
            out + at,
            rest + at,
            row,
            length,
            acc2 / total[:, None],
            PART1,
            PART2,
            BLOCK_M,
            HEAD_DIM,
            LEAVE_REST,
        )
    rows = tl.arange(0, BLOCK_M)
    lse += (image * num_heads + head) * queries + start
    tl.store(lse + rows, largest + tl.log2(total), mask=rows < length)

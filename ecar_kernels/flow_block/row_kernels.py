"""Kernels that write the normalised x for the product: before it, or in the product's own launch.

Programs that share a launch wait only for programs that have begun, never for one that may still
have to: which rows a program normalises it claims by a counter, and what is waited for are claimed
rows. So they end in whatever order the chip starts them, and one after the other in the
interpreter. Who normalises a row makes no difference to its bits.
"""

import triton
import triton.language as tl

from ecar_kernels.flow_block.kernels import (
    COUNTS,
    _add_step,
    _ask_for_weight,
    _begin,
    _finish_adaln_linear,
    _parts_of,
    _product,
    _row_statistics,
    _rows_of,
    _tile,
)


@triton.jit
def _normalise(
    view, parts, part_width, shift_view, scale_view, steps, numbers, out, sizes, first,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """adaln(x) of ROWS rows from `first` on, BLOCK channels at a time, into out [rows, channels].

    sizes: rows, tokens, channels. The rest as in `_normalised_product`.
    """
    rows, tokens, channels = sizes
    step_shift, step_shift_image, step_scale, step_scale_image = steps
    eps, scale_offset = numbers
    row = first + tl.arange(0, ROWS)[:, None]
    exists = row < rows
    row = tl.minimum(row, rows - 1)
    x = _rows_of(view, row, tokens)
    shift, scale = _rows_of(shift_view, row, tokens), _rows_of(scale_view, row, tokens)
    if parts is not None:
        parts = _parts_of(parts, row, part_width, channels)
    pivot, mean, rstd = _row_statistics(x, parts, part_width, channels, eps, ROWS, STATISTICS)
    out += row.to(tl.int64) * channels
    for begin in range(0, channels, BLOCK):
        column = begin + tl.arange(0, BLOCK)[None, :]
        mask = column < channels
        value = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
        factor = scale_offset + tl.load(scale + column, mask=mask, other=0.0).to(tl.float32)
        offset = tl.load(shift + column, mask=mask, other=0.0).to(tl.float32)
        factor = _add_step(factor, step_scale, row, tokens, step_scale_image, column, mask)
        offset = _add_step(offset, step_shift, row, tokens, step_shift_image, column, mask)
        y = (value - pivot - mean) * rstd * factor + offset
        tl.store(out + column, y.to(out.dtype.element_ty), mask=exists & mask)


@triton.jit(do_not_specialize=COUNTS)
def normalise_rows(
    x, x_image, x_token, parts, part_width,
    shift, shift_image, shift_token, scale, scale_image, scale_token,
    step_shift, step_shift_image, step_scale, step_scale_image,
    out, rows, tokens, channels, eps, scale_offset, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """adaln(x) of one row a program, into out [rows, channels]."""
    if DEPENDENT:
        _begin()
    shift_view, scale_view = (shift, shift_image, shift_token), (scale, scale_image, scale_token)
    steps = step_shift, step_shift_image, step_scale, step_scale_image
    _normalise(
        (x, x_image, x_token), parts, part_width, shift_view, scale_view, steps,
        (eps, scale_offset), out, (rows, tokens, channels), tl.program_id(0), 1, BLOCK, BLOCK,
    )  # fmt: skip


@triton.jit
def _reset(counters, count, BLOCK: tl.constexpr):
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(counters + at, tl.zeros((BLOCK,), tl.int32), mask=at < count)


@triton.jit(do_not_specialize=COUNTS)
def normalise_and_multiply(
    x, x_image, x_token, parts, part_width,
    shift, shift_image, shift_token, scale, scale_image, scale_token,
    step_shift, step_shift_image, step_scale, step_scale_image,
    normalised, normalised_image, normalised_token, counters,
    weight, weight_row, bias, out, width, keys, keys_image, keys_token,
    values, values_image, values_token, rows, tokens, outputs, inputs, eps, scale_offset,
    GELU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """adaln_linear, whose programs first write the normalised x [B, N, C], ROWS rows at a time.

    counters: zeros, and zeros again when all programs have ended: of claimed groups of rows, of
    programs that have all rows they read, and for each tile of rows of groups that are written.
    """
    weight_view = weight, weight_row
    tile = _tile(rows, outputs, BLOCK_M, BLOCK_N)
    if DEPENDENT:
        _ask_for_weight(weight_view, tile[1], outputs, inputs)
        _begin()
    shift_view, scale_view = (shift, shift_image, shift_token), (scale, scale_image, scale_token)
    steps = step_shift, step_shift_image, step_scale, step_scale_image
    ready, written = counters + 1, counters + 2
    group = tl.atomic_add(counters, 1, sem="relaxed")
    while group * ROWS < rows:
        _normalise(
            (x, x_image, x_token), parts, part_width, shift_view, scale_view, steps,
            (eps, scale_offset), normalised, (rows, tokens, inputs), group * ROWS,
            ROWS, BLOCK, STATISTICS,
        )  # fmt: skip
        tl.debug_barrier()  # one thread counts, after the stores of all
        tl.atomic_add(written + group * ROWS // BLOCK_M, 1, sem="release")
        group = tl.atomic_add(counters, 1, sem="relaxed")
    its = tl.program_id(0) // tl.cdiv(outputs, BLOCK_N)
    groups = tl.cdiv(tl.minimum(rows - its * BLOCK_M, BLOCK_M), ROWS)
    while tl.atomic_add(written + its, 0, sem="acquire") < groups:
        pass
    if tl.atomic_add(ready, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        _reset(counters, 2 + tl.cdiv(rows, BLOCK_M), 128)
    view = normalised, normalised_image, normalised_token
    sizes = rows, tokens, outputs, inputs
    y = _product(view, weight_view, sizes, tile, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    keys_view = keys, keys_image, keys_token
    values_view = values, values_image, values_token
    _finish_adaln_linear(
        y, bias, out, width, keys_view, values_view, rows, tokens, outputs, tile, GELU
    )

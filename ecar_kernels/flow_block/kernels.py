"""The Triton kernels of the fused GEMMs.

A row is a token, counted over all images; it is found in a view [B, N, C] by the strides of B
and N, so that views cost no copy. A product's program computes BLOCK_M rows of BLOCK_N outputs,
from all inputs: no two programs add to the same sum, so that their order changes no bits.

Rows past the last, of the tokens or of the weight, are read as the last one, and only stores
need their bounds; inputs past the end are masked. An argument that is None is None to the
compiler too.
"""

import triton
import triton.language as tl

from ecar_kernels import _triton

# The interpreter of Triton 3.6 to 3.9 multiplies bfloat16 operands as if their bits were integers.
_INTERPRETED = tl.constexpr(_triton.interpreting())
# Of no use to the compiler, so no reason to compile anew.
COUNTS = ["rows", "tokens"]
_GELU_SLOPE = tl.constexpr(-2 * 0.7978845608028654 * 1.4426950408889634)  # -2 sqrt(2/pi) log2(e)


@triton.jit
def _begin():
    """The kernel before this one on the stream may still run: what it writes is there after this,
    and what it reads may be written to. The kernel after this one may start, and wait likewise."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@triton.jit
def _rows_of(view, row, tokens):
    """Where rows of a view [B, N, C] begin: (tensor, strides of B and N)."""
    tensor, image_stride, token_stride = view
    image, token = row // tokens, row % tokens
    return tensor + (image.to(tl.int64) * image_stride + token.to(tl.int64) * token_stride)


@triton.jit
def _add_step(value, step, row, tokens, image_stride, column, mask):
    """value, plus a step's part [B, 1, C] or, by a stride of 0, [1, 1, C] of it; or None."""
    if step is not None:
        place = (row // tokens).to(tl.int64) * image_stride
        value += tl.load(step + (place + column), mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _block_statistics(value, inside, count):
    """Of rows of `count` values, 0 elsewhere: a number near the mean, the mean less that, and the
    sum of the squared deviations from it. All are [rows, 1].

    What is summed are deviations, for next to a large mean the variance is small; and the mean is
    in two numbers, for its rounding would show.
    """
    own = tl.sum(value, 1, keep_dims=True) / count
    deviation = tl.where(inside, value - own, 0.0)
    rest = tl.sum(deviation, 1, keep_dims=True) / count
    square = tl.sum(deviation * deviation, 1, keep_dims=True) - count * rest * rest
    return own, rest, square


@triton.jit
def _block_of_parts(parts, begin, width, channels, BLOCK: tl.constexpr):
    """The same of BLOCK parts from `begin` on, of `width` channels each, from those of each part:
    [3, parts] at `parts` [rows, 1]."""
    total = tl.cdiv(channels, width)
    part = begin + tl.arange(0, BLOCK)[None, :]
    inside = part < total
    weight = tl.where(inside, tl.minimum(channels - part * width, width), 0).to(tl.float32)
    count = tl.minimum(channels - begin * width, BLOCK * width).to(tl.float32)
    its_own = tl.load(parts + part, mask=inside, other=0.0)
    its_rest = tl.load(parts + (total + part), mask=inside, other=0.0)
    its_square = tl.load(parts + (2 * total + part), mask=inside, other=0.0)
    own = tl.sum(weight * its_own, 1, keep_dims=True) / count
    deviation = its_own - own + its_rest
    rest = tl.sum(weight * deviation, 1, keep_dims=True) / count
    square = tl.sum(its_square + weight * deviation * deviation, 1, keep_dims=True)
    return own, rest, square - count * rest * rest


@triton.jit
def _row_statistics(
    x, parts, part_width, channels, eps, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):
    """Of rows that begin at x [BLOCK_M, 1]: a number near their mean, the mean less that, and
    1 / sqrt(variance + eps). Read are BLOCK channels at a time or, where there are parts, BLOCK of
    those.

    Blocks are combined as by Chan, Golub and LeVeque (1983), their means taken from the first's.
    """
    pivot = tl.zeros((BLOCK_M, 1), tl.float32)
    mean = tl.zeros((BLOCK_M, 1), tl.float32)
    square = tl.zeros((BLOCK_M, 1), tl.float32)
    width = 1 if parts is None else part_width
    for first in range(0, tl.cdiv(channels, width), BLOCK):
        begin = first * width
        count = tl.minimum(channels - begin, BLOCK * width).to(tl.float32)
        if parts is None:
            column = begin + tl.arange(0, BLOCK)[None, :]
            inside = column < channels
            value = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
            own, rest, its_square = _block_statistics(value, inside, count)
        else:
            own, rest, its_square = _block_of_parts(parts, first, width, channels, BLOCK)
        pivot = tl.where(first == 0, own, pivot)
        before = begin * 1.0
        change = own - pivot + rest - mean
        mean += change * (count / (before + count))
        square += its_square + change * change * (before * count / (before + count))
    return pivot, mean, 1.0 / tl.sqrt_rn(square / channels + eps)


@triton.jit
def _parts_of(parts, row, width, channels):
    """Where those of rows begin."""
    return parts + row.to(tl.int64) * (3 * tl.cdiv(channels, width))


@triton.jit
def _multiply(a, weight, inside, total, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr):
    """total + a [BLOCK_M, BLOCK_K] times the weight's tile, which `weight` points to.

    TRANSPOSED: by the product of the transposes. A warp group's first factor may lie in registers,
    where Triton 3.6 leaves what is computed there; ptxas then lets no two of its products overlap.
    """
    w = tl.load(weight, mask=inside[:, None], other=0.0)
    if _INTERPRETED:
        a, w = a.to(tl.float32), w.to(tl.float32)
    if TRANSPOSED:
        y = tl.dot(tl.trans(w), tl.trans(a), tl.trans(total), input_precision=PRECISION)
        return tl.trans(y)
    return tl.dot(a, w, total, input_precision=PRECISION)


@triton.jit
def _tile(rows, outputs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's rows and outputs. Programs that share rows are neighbours in time: the
    rows come from memory once, and the weight, which all share, stays in the L2 cache."""
    columns = tl.cdiv(outputs, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    return row, output


@triton.jit
def _product(
    view,
    weight_view,
    sizes,
    tile,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x weight^T of this program's rows and outputs.

    weight_view: (weight, stride of its rows). sizes: rows, tokens, outputs, inputs. tile: rows and
    outputs of this program.
    """
    rows, tokens, outputs, inputs = sizes
    row, output = tile
    x = _rows_of(view, tl.minimum(row, rows - 1), tokens)[:, None]
    weight = _weight_columns(weight_view, output, outputs)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, inputs, BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)
        inside = channel < inputs
        a = tl.load(x + channel[None, :], mask=inside[None, :], other=0.0)
        total = _multiply(a, weight + channel[:, None], inside, total, PRECISION, False)
    return total


@triton.jit
def _weight_columns(weight_view, output, outputs):
    weight, weight_row = weight_view
    return weight + tl.minimum(output, outputs - 1).to(tl.int64)[None, :] * weight_row


@triton.jit
def _ask_for_weight(weight_view, output, outputs, inputs):
    """Its lines of 128 bytes, into the L2 cache: also where the kernel before has not ended, for
    nothing is read yet."""
    weight = _weight_columns(weight_view, output, outputs)
    line: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    for first in range(0, inputs, 4 * line):
        channel = tl.minimum(first + tl.arange(0, 4) * line, inputs - 1)
        place = (weight + channel[:, None]).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [place], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _normalised_product(
    view, parts, part_width, shift_view, scale_view, steps, numbers, weight_view, sizes, tile,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    STATISTICS: tl.constexpr,
):  # fmt: skip
    """adaln(x) weight^T, the normalised x made in registers and rounded to x's type.

    steps: step_shift and step_scale, each with its stride; numbers: eps and scale_offset.
    STATISTICS: channels, or parts, that are read at once for the rows' statistics. The rest as in
    `_product`.
    """
    rows, tokens, outputs, inputs = sizes
    row, output = tile
    step_shift, step_shift_image, step_scale, step_scale_image = steps
    eps, scale_offset = numbers
    row = tl.minimum(row, rows - 1)
    x = _rows_of(view, row, tokens)[:, None]
    if parts is not None:
        parts = _parts_of(parts, row[:, None], part_width, inputs)
    pivot, mean, rstd = _row_statistics(x, parts, part_width, inputs, eps, BLOCK_M, STATISTICS)
    shift = _rows_of(shift_view, row, tokens)[:, None]
    scale = _rows_of(scale_view, row, tokens)[:, None]
    weight = _weight_columns(weight_view, output, outputs)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    TRANSPOSED: tl.constexpr = BLOCK_M * BLOCK_N > 4096
    row = row[:, None]
    for first in range(0, inputs, BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)
        inside = channel < inputs
        column, mask = channel[None, :], inside[None, :]
        value = tl.load(x + column, mask=mask, other=0.0)
        factor = scale_offset + tl.load(scale + column, mask=mask, other=0.0).to(tl.float32)
        offset = tl.load(shift + column, mask=mask, other=0.0).to(tl.float32)
        factor = _add_step(factor, step_scale, row, tokens, step_scale_image, column, mask)
        offset = _add_step(offset, step_shift, row, tokens, step_shift_image, column, mask)
        a = (value.to(tl.float32) - pivot - mean) * rstd * factor + offset
        # Past the last input the mean remains, and in float16 it may overflow.
        a = tl.where(mask, a, 0.0).to(value.dtype)
        total = _multiply(a, weight + channel[:, None], inside, total, PRECISION, TRANSPOSED)
    return total


@triton.jit
def _finish_adaln_linear(
    y, bias, out, width, keys_view, values_view, rows, tokens, outputs, tile, GELU: tl.constexpr
):
    """Stores act(y + bias): the epilogue of adaln_linear. The first `width` outputs go to out, as
    many then to rows of keys_view, and the last to rows of values_view, where there are those."""
    row, output = tile
    if bias is not None:
        y += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    if GELU:
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), which does not cancel where y < 0.
        y = y / (1 + tl.exp2((y + 0.044715 * y * y * y) * _GELU_SLOPE))
    y = y.to(out.dtype.element_ty)
    inside, column = (row < rows)[:, None], output[None, :]
    place = row.to(tl.int64)[:, None] * width + column
    tl.store(out + place, y, mask=inside & (column < width))
    if keys_view[0] is not None:
        key = _rows_of(keys_view, row, tokens)[:, None] + (column - width)
        value = _rows_of(values_view, row, tokens)[:, None] + (column - 2 * width)
        tl.store(key, y, mask=inside & (column >= width) & (column < 2 * width))
        tl.store(value, y, mask=inside & (column >= 2 * width) & (column < outputs))


@triton.jit
def _finish_gated_residual(
    y, bias, gate_view, step_gate, step_gate_image, residual_view, out, parts,
    rows, tokens, outputs, tile, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores residual + (gate + step_gate) (y + bias), and where there is room for `parts` the
    statistics of what it stored: the epilogue of linear_gated_residual."""
    row, output = tile
    column = output[None, :]
    mask = (row < rows)[:, None] & (column < outputs)
    if bias is not None:
        y += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    gate = _rows_of(gate_view, row, tokens)[:, None]
    residual = _rows_of(residual_view, row, tokens)[:, None]
    factor = tl.load(gate + column, mask=mask, other=0.0).to(tl.float32)
    factor = _add_step(factor, step_gate, row[:, None], tokens, step_gate_image, column, mask)
    y = tl.load(residual + column, mask=mask, other=0.0).to(tl.float32) + factor * y
    y = y.to(out.dtype.element_ty)
    place = row.to(tl.int64)[:, None] * outputs + column
    if parts is not None:
        total = tl.cdiv(outputs, BLOCK_N)
        part = tl.program_id(0) % total
        count = tl.minimum(outputs - part * BLOCK_N, BLOCK_N).to(tl.float32)
        value = tl.where(column < outputs, y.to(tl.float32), 0.0)
        own, rest, square = _block_statistics(value, column < outputs, count)
        parts = _parts_of(parts, row[:, None], BLOCK_N, outputs) + part
        tl.store(parts, own, mask=(row < rows)[:, None])
        tl.store(parts + total, rest, mask=(row < rows)[:, None])
        tl.store(parts + 2 * total, square, mask=(row < rows)[:, None])
    tl.store(out + place, y, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def adaln_linear(
    x, x_image, x_token, parts, part_width,
    shift, shift_image, shift_token, scale, scale_image, scale_token,
    step_shift, step_shift_image, step_scale, step_scale_image,
    weight, weight_row, bias, out, width, keys, keys_image, keys_token,
    values, values_image, values_token, rows, tokens, outputs, inputs, eps, scale_offset,
    GELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, STATISTICS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """act(adaln(x) weight^T + bias). Where shift and scale are None, x is normalised already.

    parts: None, or x's statistics [rows, 3, T], each of `part_width` channels, the last of fewer:
    as linear_gated_residual leaves them. They take the place of a pass over the rows.
    out has `width` columns: all, or a third, where keys and values take the others.
    """
    view, weight_view = (x, x_image, x_token), (weight, weight_row)
    sizes = rows, tokens, outputs, inputs
    tile = _tile(rows, outputs, BLOCK_M, BLOCK_N)
    if DEPENDENT:
        _ask_for_weight(weight_view, tile[1], outputs, inputs)
        _begin()
    if shift is None:
        y = _product(view, weight_view, sizes, tile, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    else:
        shift_view = shift, shift_image, shift_token
        scale_view = scale, scale_image, scale_token
        steps = step_shift, step_shift_image, step_scale, step_scale_image
        y = _normalised_product(
            view, parts, part_width, shift_view, scale_view, steps, (eps, scale_offset),
            weight_view, sizes, tile,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, STATISTICS,
        )  # fmt: skip
    keys_view = keys, keys_image, keys_token
    values_view = values, values_image, values_token
    _finish_adaln_linear(
        y, bias, out, width, keys_view, values_view, rows, tokens, outputs, tile, GELU
    )


@triton.jit(do_not_specialize=COUNTS)
def linear_gated_residual(
    h, h_image, h_token, weight, weight_row, bias,
    gate, gate_image, gate_token, step_gate, step_gate_image,
    residual, residual_image, residual_token, out, parts, rows, tokens, outputs, inputs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """residual + (gate + step_gate) (h weight^T + bias).

    parts: None, or room for the result's statistics [rows, 3, T], each of BLOCK_N channels, the
    last of fewer: of each, as rounded, what `_block_statistics` makes.
    """
    view, weight_view = (h, h_image, h_token), (weight, weight_row)
    sizes = rows, tokens, outputs, inputs
    tile = _tile(rows, outputs, BLOCK_M, BLOCK_N)
    if DEPENDENT:
        _ask_for_weight(weight_view, tile[1], outputs, inputs)
        _begin()
    y = _product(view, weight_view, sizes, tile, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    gate_view = gate, gate_image, gate_token
    residual_view = residual, residual_image, residual_token
    _finish_gated_residual(
        y, bias, gate_view, step_gate, step_gate_image, residual_view, out, parts,
        rows, tokens, outputs, tile, BLOCK_N,
    )  # fmt: skip

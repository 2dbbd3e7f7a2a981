"""The Triton kernels of the adaLN family: one forward, one backward, one sum over partial sums.

A program works on rows of one image, ROWS at once, each padded to BLOCK >= C columns and held in
registers: everything is read once. Rows of a view [B, N, C] are found by the strides of B and N
(0 where the tensor has one row for all), so views cost no copy. Where registers allow it, loads
come before the first reduction (EARLY), since none is moved over its barriers.

Which op a kernel computes follows from its arguments. Those that are None are None to the
compiler too: without `branch` there is no gate, without a modulation no LayerNorm, and a gradient
without a place to go is not computed.
"""

import triton
import triton.language as tl

# Of no use to the compiler, so no reason to compile anew.
COUNTS = ["tokens", "program_rows", "image_programs", "programs", "images", "slots"]


@triton.jit
def _load(view, place):
    """Rows of a view (tensor, strides of B and N) in float32; 0 outside the mask."""
    tensor, image_stride, token_stride = view
    image, token, column, mask = place
    row = tensor + (image * image_stride + token * token_stride)
    return tl.load(row + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _combined(view, step, step_stride, place):
    """A modulation: the token's part and, unless it is None, the step's."""
    value = _load(view, place)
    if step is not None:
        value += _load((step, step_stride, 0), place)
    return value


@triton.jit
def _store(tensor, row, column, value, mask):
    tl.store(tensor + row + column, value.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def _statistics(x, column, eps, C: tl.constexpr):
    """x - mean, which is 0 in the padding, and 1 / sqrt(variance + eps)."""
    valid = column < C
    centred = tl.where(valid, x - tl.sum(x, 1, keep_dims=True) / C, 0.0)
    # Beside a large mean the variance is small, and the mean's rounding would show.
    centred = tl.where(valid, centred - tl.sum(centred, 1, keep_dims=True) / C, 0.0)
    variance = tl.sum(centred * centred, 1, keep_dims=True) / C
    return centred, 1.0 / tl.sqrt_rn(variance + eps)


@triton.jit(do_not_specialize=COUNTS)
def forward(
    x,
    x_image,
    x_token,
    branch,
    branch_image,
    branch_token,
    gate,
    gate_image,
    gate_token,
    step_gate,
    step_gate_image,
    shift,
    shift_image,
    shift_token,
    step_shift,
    step_shift_image,
    scale,
    scale_image,
    scale_token,
    step_scale,
    step_scale_image,
    new_x,
    y,
    tokens,
    image_programs,
    eps,
    EARLY: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """new_x = x + (gate + step_gate) branch, y = LN(new_x) (1 + scale + step_scale) + shift + ..

    Inputs [B, N, C] by strides, `tokens` = N; outputs contiguous. A program does ROWS rows, so
    `image_programs` = ceil(N / ROWS) do an image. EARLY: whether the modulation is read before the
    first reduction or, to save registers, after the last.
    """
    program = tl.program_id(0)
    image = (program // image_programs).to(tl.int64)
    token = (program % image_programs).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (token < tokens) & (column < C)
    row = (image * tokens + token) * C
    place = image, token, column, mask
    value = _load((x, x_image, x_token), place)
    if branch is not None:
        branch_value = _load((branch, branch_image, branch_token), place)
        gate_value = _combined((gate, gate_image, gate_token), step_gate, step_gate_image, place)
    shift_view, scale_view = (shift, shift_image, shift_token), (scale, scale_image, scale_token)
    if EARLY and shift is not None:
        shift_value = _combined(shift_view, step_shift, step_shift_image, place)
        scale_value = _combined(scale_view, step_scale, step_scale_image, place)
    if branch is not None:
        value += gate_value * branch_value
        _store(new_x, row, column, value, mask)
        # The LayerNorm sees what was stored.
        value = value.to(new_x.dtype.element_ty).to(tl.float32)
    if shift is not None:
        centred, inverse_deviation = _statistics(value, column, eps, C)
        if not EARLY:
            shift_value = _combined(shift_view, step_shift, step_shift_image, place)
            scale_value = _combined(scale_view, step_scale, step_scale_image, place)
        value = centred * inverse_deviation * (1.0 + scale_value) + shift_value
        _store(y, row, column, value, mask)


@triton.jit
def _residual(grad_view, branch_view, gate_view, step_gate, place):
    """What the backward of the gated residual reads: of what is None, zeros that cost nothing."""
    grad = tl.zeros(place[3].shape, tl.float32)
    branch_value, gate_value = grad, grad
    if grad_view[0] is not None:
        grad = _load(grad_view, place)
    if branch_view[0] is not None:
        branch_value = _load(branch_view, place)
        gate_value = _load(gate_view, place) + step_gate
    return grad, branch_value, gate_value


@triton.jit
def _step(step, step_stride, image, column, C: tl.constexpr):
    """A step's row of an image, which all its tokens share; 0 where there is none."""
    if step is None:
        return 0.0
    else:
        return _load((step, step_stride, 0), (image, 0, column, column < C))


@triton.jit(do_not_specialize=COUNTS)
def backward(
    grad_new_x,
    grad_new_x_image,
    grad_new_x_token,
    grad_y,
    grad_y_image,
    grad_y_token,
    x,
    x_image,
    x_token,
    branch,
    branch_image,
    branch_token,
    gate,
    gate_image,
    gate_token,
    step_gate,
    step_gate_image,
    scale,
    scale_image,
    scale_token,
    step_scale,
    step_scale_image,
    grad_x,
    grad_branch,
    grad_gate,
    grad_scale,
    partial,
    tokens,
    program_rows,
    image_programs,
    slots,
    eps,
    SUM_GATE: tl.constexpr,
    SUM_SHIFT: tl.constexpr,
    SUM_SCALE: tl.constexpr,
    EARLY: tl.constexpr,
    STAGES: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients of the forward, contiguous, and sums over tokens of those that were broadcast.

    x is what the LayerNorm saw, new_x where there is a gate. A program does `program_rows` rows,
    and `image_programs` do an image. Its sums of the gradients of gate, shift and scale, of each
    that is flagged, go to the first of partial [programs, slots, C], float32. EARLY: whether the
    gated residual is read before the LayerNorm's gradient is known, or, to save registers, after.
    STAGES: with 2, the next rows are copied to shared memory while these are done.
    """
    program = tl.program_id(0)
    image = (program // image_programs).to(tl.int64)
    first = (program % image_programs).to(tl.int64) * program_rows
    last = tl.minimum(first + program_rows, tokens)
    column = tl.arange(0, BLOCK)[None, :]
    gate_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    shift_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    scale_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    grad_view = grad_new_x, grad_new_x_image, grad_new_x_token
    branch_view, gate_view = (branch, branch_image, branch_token), (gate, gate_image, gate_token)
    gated = grad_view, branch_view, gate_view, _step(step_gate, step_gate_image, image, column, C)
    step = 1.0 + _step(step_scale, step_scale_image, image, column, C)
    for begin in tl.range(first, last, ROWS, num_stages=STAGES):
        token = begin + tl.arange(0, ROWS)[:, None]
        mask = (token < last) & (column < C)
        row = (image * tokens + token) * C
        place = image, token, column, mask
        if EARLY:
            grad, branch_value, gate_value = _residual(*gated, place)
        if grad_y is not None:
            shift_gradient = _load((grad_y, grad_y_image, grad_y_token), place)
            value = _load((x, x_image, x_token), place)
            factor = _load((scale, scale_image, scale_token), place) + step
            # dx = (g - mean(g) - n mean(g n)) / deviation, with g = dy (1 + scale), n = LN(x).
            centred, inverse_deviation = _statistics(value, column, eps, C)
            normal = centred * inverse_deviation
            scale_gradient = shift_gradient * normal
            if grad_scale is not None:
                _store(grad_scale, row, column, scale_gradient, mask)
            if SUM_SHIFT:
                shift_sum += shift_gradient
            if SUM_SCALE:
                scale_sum += scale_gradient
            modulated = shift_gradient * factor
            mean = tl.sum(modulated, 1, keep_dims=True) / C
            slope = tl.sum(modulated * normal, 1, keep_dims=True) / C
            norm_gradient = (modulated - mean - normal * slope) * inverse_deviation
        if not EARLY:
            grad, branch_value, gate_value = _residual(*gated, place)
        if grad_y is not None:
            grad += norm_gradient
            if grad_x is not None:
                _store(grad_x, row, column, grad, mask)
        if branch is not None:
            if grad_branch is not None:
                _store(grad_branch, row, column, grad * gate_value, mask)
            gate_gradient = grad * branch_value
            if grad_gate is not None:
                _store(grad_gate, row, column, gate_gradient, mask)
            if SUM_GATE:
                gate_sum += gate_gradient
    if partial is not None:
        column = tl.arange(0, BLOCK)
        out = partial + program.to(tl.int64) * (slots * C)
        if SUM_GATE:
            tl.store(out + column, tl.sum(gate_sum, 0), mask=column < C)
            out += C
        if SUM_SHIFT:
            tl.store(out + column, tl.sum(shift_sum, 0), mask=column < C)
            out += C
        if SUM_SCALE:
            tl.store(out + column, tl.sum(scale_sum, 0), mask=column < C)


@triton.jit(do_not_specialize=COUNTS)
def sum_partial(
    partial,
    sums,
    programs,
    image_programs,
    images,
    slots,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """partial [programs, slots, C] into sums [slots, images (+ 1), C], in a fixed order.

    Program (i, .., ..) sums the `image_programs` rows of image i or, where i is `images`, all.
    """
    image = tl.program_id(0)
    slot = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = image * image_programs
    last = first + image_programs
    if image == images:
        first = 0
        last = programs
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(first, last, ROWS):
        row = begin + tl.arange(0, ROWS)[:, None]
        place = (row * slots + slot) * C + column[None, :]
        total += tl.load(partial + place, mask=(row < last) & (column < C)[None, :], other=0.0)
    place = (slot * tl.num_programs(0) + image) * C + column
    tl.store(sums + place, tl.sum(total, 0).to(sums.dtype.element_ty), mask=column < C)

"""The adaLN family on GPUs: the kernels as ops, and their autograd.

Backwards recompute the LayerNorm's statistics: the row is in registers anyway, and what the
forward could save of them would need more digits of the mean than float32 has.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ecar_kernels import _triton, tuning
from ecar_kernels.adaln import autograd, kernels, launch


def _sums_asked(
    wanted: tuple, whole: tuple, steps_wanted: tuple, shared: tuple
) -> tuple[list[bool], bool, bool]:
    """Which modulations' gradients are summed over tokens; whether for each image; over all."""
    broadcast = [want and not its for want, its in zip(wanted, whole, strict=True)]
    whole_batch = [want and its for want, its in zip(steps_wanted, shared, strict=True)]
    summed = [a or b for a, b in zip(broadcast, steps_wanted, strict=True)]
    images = any(broadcast) or whole_batch != list(steps_wanted)
    return summed, images, any(whole_batch)


def _modulation_gradients(
    x: Tensor,
    gradients: tuple,
    wanted: tuple,
    whole: tuple,
    steps_wanted: tuple,
    shared: tuple,
    summed: list[bool],
    sums: Tensor,
) -> list[Tensor | None]:
    """Those of the tokens' parts, then those of the steps'; `gradients`: where nothing is
    summed."""
    parts, steps, slot = [], [], 0
    for i, gradient in enumerate(gradients):
        part = step = None
        if wanted[i]:
            part = gradient if whole[i] else sums[slot, : x.shape[0], None]
        if steps_wanted[i]:
            # The sum over all images is the last row.
            rows = sums[slot, -1:] if shared[i] else sums[slot, : x.shape[0]]
            step = rows[:, None]
        parts.append(part)
        steps.append(step)
        slot += summed[i]
    return parts + steps


# `saved`, here and in `autograd`: the gradients of the outputs, what the op's Function keeps, and
# eps; as the backward takes them.


def adaln_gradients(saved, wanted, whole, shared):
    grad_y, x, *_ = saved
    x_wanted, *others = wanted
    asked = others[:2], whole, others[2:], shared
    summed, images, total = _sums_asked(*asked)
    grad_x, grad_scale, sums = _adaln_backward(
        *saved, [x_wanted, others[1] and whole[1]], summed, images, total
    )
    gradients = _modulation_gradients(x, (grad_y, grad_scale), *asked, summed, sums)
    return grad_x if x_wanted else None, *gradients


def gated_residual_gradients(saved, wanted, whole, shared):
    branch_wanted, gate_wanted, step_wanted = wanted
    asked = (gate_wanted,), whole, (step_wanted,), shared
    summed, images, total = _sums_asked(*asked)
    grad_branch, grad_gate, sums = _gated_residual_backward(
        *saved, [branch_wanted, gate_wanted and whole[0]], summed, images, total
    )
    gradients = _modulation_gradients(saved[1], (grad_gate,), *asked, summed, sums)
    return grad_branch if branch_wanted else None, *gradients


def _both_gradients(saved, wanted, whole, shared):
    _, grad_y, new_x, *_ = saved
    x_wanted, branch_wanted, *others = wanted
    asked = others[:3], whole, others[3:], shared
    summed, images, total = _sums_asked(*asked)
    written = [x_wanted, branch_wanted, others[0] and whole[0], others[2] and whole[2]]
    grad_x, grad_branch, grad_gate, grad_scale, sums = _both_backward(
        *saved, written, summed, images, total
    )
    gradients = _modulation_gradients(new_x, (grad_gate, grad_y, grad_scale), *asked, summed, sums)
    return (grad_x if x_wanted else None, grad_branch if branch_wanted else None, *gradients)


# Instead of (branch, gate, step_gate), and of (shift, scale, step_shift, step_scale).
_UNGATED, _UNMODULATED = (None,) * 3, (None,) * 4


def _run_adaln(x, shift, scale, step_shift, step_scale, eps):
    y = x.new_empty(x.shape)
    modulation = shift, scale, step_shift, step_scale
    _forward("adaln", x, _UNGATED, modulation, None, y, eps)
    return y


def _run_gated_residual(x, branch, gate, step_gate):
    new_x = x.new_empty(x.shape)
    _forward("gated_residual", x, (branch, gate, step_gate), _UNMODULATED, new_x, None, 0.0)
    return new_x


def _run_both(x, branch, gate, shift, scale, step_gate, step_shift, step_scale, eps):
    new_x, y = x.new_empty(x.shape), x.new_empty(x.shape)
    modulation = shift, scale, step_shift, step_scale
    _forward("gated_residual_adaln", x, (branch, gate, step_gate), modulation, new_x, y, eps)
    return new_x, y


def _settings(op: str, x: Tensor, *others: Tensor | None):
    """others: what backward reads beside x, whose settings of wide rows depend on how they lie."""
    arch = _triton.architecture(x.device.index)
    rows = x.shape[0] * x.shape[1]
    aligned = (
        not others
        or launch.padded(x.shape[2]) <= 2048
        or all(tensor is None or _aligned(tensor) for tensor in (x, *others))
    )
    usual = launch.default(op, x.shape[2], rows, arch, aligned)
    if not aligned and x.shape[2] % 16 == 0:
        return usual  # what was measured is for aligned rows of this width
    return tuning.choose(op, (x.shape[2], x.element_size()), rows, usual, x.device.index)


def _aligned(tensor: Tensor) -> bool:
    """Multiples of 16 are what Triton compiles for."""
    return tensor.data_ptr() % 16 == 0 and all(x % 16 == 0 for x in tensor.stride()[:-1])


def _view(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """[B, N, C] or, read for every token, [B, 1, C], with the strides of B and N."""
    if tensor is None:
        return None, 0, 0
    return tensor, tensor.stride(0), tensor.stride(1) if tensor.shape[1] > 1 else 0


def _step(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """[B, 1, C] or, read for every image, [1, 1, C], with the stride of B."""
    if tensor is None:
        return None, 0
    return tensor, tensor.stride(0) if tensor.shape[0] > 1 else 0


def _forward(
    op: str,
    x: Tensor,
    gated: tuple[Tensor | None, ...],
    modulation: tuple[Tensor | None, ...],
    new_x: Tensor | None,
    y: Tensor | None,
    eps: float,
) -> None:
    branch, gate, step_gate = gated
    shift, scale, step_shift, step_scale = modulation
    if not x.numel():
        return
    batch, tokens, channels = x.shape
    its = _settings(op, x)
    image_programs = -(-tokens // its.rows)
    kernels.forward[(batch * image_programs,)](
        *_view(x),
        *_view(branch),
        *_view(gate),
        *_step(step_gate),
        *_view(shift),
        *_step(step_shift),
        *_view(scale),
        *_step(step_scale),
        new_x,
        y,
        tokens,
        image_programs,
        eps,
        **_options(its, channels),
    )


def _options(its: launch.ForwardSettings, channels: int) -> dict[str, int]:
    return {
        **its.loads,
        "C": channels,
        "BLOCK": launch.padded(channels),
        "ROWS": its.rows,
        "num_warps": its.num_warps,
        "maxnreg": its.max_registers,
    }


def _run_adaln_backward(grad_y, x, scale, step_scale, eps, wanted, summed, images, total):
    grad_x, grad_scale, sums = results = _results(x, wanted, summed, images, total)
    its = _settings("adaln_backward", x, grad_y, scale, step_scale)
    asked = (grad_x, None, None, grad_scale), (False, *summed), sums, images
    _backward(its, x, (None, grad_y), _UNGATED, (scale, step_scale), *asked, eps)
    return results


def _run_gated_residual_backward(grad, branch, gate, step_gate, wanted, summed, images, total):
    grad_branch, grad_gate, sums = results = _results(branch, wanted, summed, images, total)
    its = _settings("gated_residual_backward", branch, grad, gate, step_gate)
    asked = (None, grad_branch, grad_gate, None), (*summed, False, False), sums, images
    _backward(its, branch, (grad, None), (branch, gate, step_gate), (None, None), *asked, 0.0)
    return results


def _run_both_backward(
    grad_new_x, grad_y, new_x, branch, gate, scale, step_gate, step_scale, eps, *asked
):
    wanted, summed, images, _ = asked
    *gradients, sums = results = _results(new_x, *asked)
    grads, gated, modulation = (grad_new_x, grad_y), (branch, gate, step_gate), (scale, step_scale)
    its = _settings("gated_residual_adaln_backward", new_x, *grads, *gated, *modulation)
    if its.fused:
        _backward(its, new_x, grads, gated, modulation, gradients, summed, sums, images, eps)
        return results
    grad_x, grad_branch, grad_gate, grad_scale = gradients
    gate_asked = wanted[1] or wanted[2] or summed[0]
    whole = grad_x if wanted[0] or not gate_asked else new_x.new_empty(new_x.shape)
    of_norm, its_sums = (whole, None, None, grad_scale), sums[summed[0] :]
    flags = False, *summed[1:]
    _backward(its, new_x, grads, _UNGATED, modulation, of_norm, flags, its_sums, images, eps)
    if gate_asked:
        grads, flags, its_sums = (whole, None), (summed[0], False, False), sums[: summed[0]]
        of_gate = None, grad_branch, grad_gate, None
        _backward(its, new_x, grads, gated, (None, None), of_gate, flags, its_sums, images, 0.0)
    return results


def _asked(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is not None and tensor.numel() else None


def _backward(
    its: launch.BackwardSettings,
    like: Tensor,
    grads: tuple[Tensor | None, Tensor | None],
    gated: tuple[Tensor | None, ...],
    modulation: tuple[Tensor | None, Tensor | None],
    gradients: Sequence[Tensor | None],
    summed: Sequence[bool],
    sums: Tensor,
    images: bool,
    eps: float,
) -> None:
    """like: what the LayerNorm saw or, where there is none, any of the tokens. grads: of the
    residual stream, and of the LayerNorm. modulation: scale and step_scale. gradients: of x,
    branch, gate and scale; those without elements, or None, are not computed."""
    (grad_new_x, grad_y), (branch, gate, step_gate) = grads, gated
    x, (scale, step_scale) = None if grad_y is None else like, modulation
    outputs = [_asked(tensor) for tensor in gradients]
    batch, tokens, channels = like.shape
    slots = len(sums)
    its = its if slots else its.unsummed()
    image_programs = -(-tokens // its.program_rows)
    programs = batch * image_programs
    partial = None
    if slots:
        partial = like.new_empty((programs, slots, channels), dtype=torch.float32)
    if like.numel() and (slots or any(tensor is not None for tensor in outputs)):
        kernels.backward[(programs,)](
            *_view(grad_new_x),
            *_view(grad_y),
            *_view(x),
            *_view(branch),
            *_view(gate),
            *_step(step_gate),
            *_view(scale),
            *_step(step_scale),
            *outputs,
            partial,
            tokens,
            its.program_rows,
            image_programs,
            slots,
            eps,
            *summed,
            **_options(its, channels),
        )
    if sums.numel():
        grid = sums.shape[1], -(-channels // launch.SUM_COLUMNS), slots
        kernels.sum_partial[grid](
            partial,
            sums,
            programs,
            image_programs,
            batch if images else 0,
            slots,
            C=channels,
            BLOCK=launch.SUM_COLUMNS,
            ROWS=launch.SUM.rows,
            num_warps=launch.SUM.num_warps,
            maxnreg=launch.SUM.max_registers,
        )


def _fake_adaln(x, shift, scale, step_shift, step_scale, eps):
    return x.new_empty(x.shape)


def _fake_gated_residual(x, branch, gate, step_gate):
    return x.new_empty(x.shape)


def _fake_both(x, branch, gate, shift, scale, step_gate, step_shift, step_scale, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _results(
    x: Tensor, wanted: Sequence[bool], summed: Sequence[bool], images: bool, total: bool
) -> tuple[Tensor, ...]:
    """What a backward returns, empty: the gradients, and the sums."""
    gradients = (x.new_empty(x.shape if asked else 0) for asked in wanted)
    rows = (x.shape[0] if images else 0) + total
    return *gradients, x.new_empty((sum(summed), rows, x.shape[2]))


def _fake_adaln_backward(grad_y, x, scale, step_scale, eps, *asked):
    return _results(x, *asked)


def _fake_gated_residual_backward(grad, branch, gate, step_gate, *asked):
    return _results(branch, *asked)


def _fake_both_backward(grad_new_x, grad_y, new_x, *others):
    return _results(new_x, *others[-4:])


# `wanted`: the gradients to be written for every token, of x, branch, gate and scale (of those
# that the op has); others come without elements. `summed`: of which of gate, shift and scale the
# sums over tokens are asked for, for each of the `images`, in `total`, or both: the last result is
# [sum(summed), images B + total, C].
adaln_forward = _triton.register(
    "adaln(Tensor x, Tensor shift, Tensor scale, Tensor? step_shift, Tensor? step_scale, "
    "float eps) -> Tensor",
    _run_adaln,
    _fake_adaln,
)
_adaln_backward = _triton.register(
    "adaln_backward(Tensor grad_y, Tensor x, Tensor scale, Tensor? step_scale, float eps, "
    "bool[] wanted, bool[] summed, bool images, bool total) -> (Tensor, Tensor, Tensor)",
    _run_adaln_backward,
    _fake_adaln_backward,
)
gated_residual_forward = _triton.register(
    "gated_residual(Tensor x, Tensor branch, Tensor gate, Tensor? step_gate) -> Tensor",
    _run_gated_residual,
    _fake_gated_residual,
)
_gated_residual_backward = _triton.register(
    "gated_residual_backward(Tensor grad, Tensor branch, Tensor gate, Tensor? step_gate, "
    "bool[] wanted, bool[] summed, bool images, bool total) -> (Tensor, Tensor, Tensor)",
    _run_gated_residual_backward,
    _fake_gated_residual_backward,
)
_both = _triton.register(
    "gated_residual_adaln(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, "
    "Tensor? step_gate, Tensor? step_shift, Tensor? step_scale, float eps) -> (Tensor, Tensor)",
    _run_both,
    _fake_both,
)
_both_backward = _triton.register(
    "gated_residual_adaln_backward(Tensor grad_new_x, Tensor grad_y, Tensor new_x, "
    "Tensor branch, Tensor gate, Tensor scale, Tensor? step_gate, Tensor? step_scale, float eps, "
    "bool[] wanted, bool[] summed, bool images, bool total) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_both_backward,
    _fake_both_backward,
)

adaln = autograd.adaln(adaln_forward, adaln_gradients)
gated_residual = autograd.gated_residual(gated_residual_forward, gated_residual_gradients)
gated_residual_adaln = autograd.gated_residual_adaln(_both, _both_gradients)

"""The adaLN family in C++, for CPU tensors: csrc/cpu/adaln_isa.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ecar_kernels import _native
from ecar_kernels.adaln import autograd

_native.require()

_adaln_backward = _native.op("adaln_backward")
_gated_residual_backward = _native.op("gated_residual_backward")
_both_backward = _native.op("gated_residual_adaln_backward")


def _of_modulations(
    wanted: Sequence[bool], whole: Sequence[Tensor | None], shared: Sequence[bool], sums: Tensor
) -> list[Tensor | None]:
    """The gradients of the modulations' parts for tokens, then of the steps' parts.

    whole: those of [B, N, C]. The others come out of sums [slots, B + 1, C], which are each
    image's and then the total: of [B, 1, C], and where a step's part is shared, of [1, 1, C].
    """
    each: Sequence[Tensor | None] = whole
    total = each
    if sums.ndim == 3:  # else no sum is wanted
        each = sums[:, :-1, None].unbind(0)
        total = sums[:, -1:, None].unbind(0) if True in shared else each
    slots = range(len(whole))
    found = [each[i] if whole[i] is None else whole[i] for i in slots]
    found += [total[i] if shared[i] else each[i] for i in slots]
    return [one if is_wanted else None for one, is_wanted in zip(found, wanted, strict=True)]


# `saved`, here and in `autograd`: the gradients of the outputs, what the op's Function keeps, and
# eps; as the backward takes them.


def adaln_gradients(saved, wanted, whole, shared):
    _, shift_, scale_, *steps_ = wanted
    whole_shift, whole_scale = whole
    grad_x, grad_scale, sums = _adaln_backward(
        *saved,
        scale_ and whole_scale,
        any(steps_) or (shift_ and not whole_shift) or (scale_ and not whole_scale),
    )
    parts = saved[0] if whole_shift else None, grad_scale if whole_scale else None
    return grad_x, *_of_modulations(wanted[1:], parts, shared, sums)


def gated_residual_gradients(saved, wanted, whole, shared):
    _, gate_, step_ = wanted
    grad_branch, grad_gate, sums = _gated_residual_backward(
        *saved, gate_ and whole[0], step_ or (gate_ and not whole[0])
    )
    parts = (grad_gate if whole[0] else None,)
    return grad_branch, *_of_modulations(wanted[1:], parts, shared, sums)


def _both_gradients(saved, wanted, whole, shared):
    _, _, gate_, shift_, scale_, *steps_ = wanted
    whole_gate, whole_shift, whole_scale = whole
    grad_x, grad_branch, grad_gate, grad_scale, sums = _both_backward(
        *saved,
        gate_ and whole_gate,
        scale_ and whole_scale,
        any(steps_)
        or (gate_ and not whole_gate)
        or (shift_ and not whole_shift)
        or (scale_ and not whole_scale),
    )
    parts = (
        grad_gate if whole_gate else None,
        saved[1] if whole_shift else None,
        grad_scale if whole_scale else None,
    )
    return grad_x, grad_branch, *_of_modulations(wanted[2:], parts, shared, sums)


adaln_forward, gated_residual_forward = _native.op("adaln"), _native.op("gated_residual")
adaln = autograd.adaln(adaln_forward, adaln_gradients)
gated_residual = autograd.gated_residual(gated_residual_forward, gated_residual_gradients)
gated_residual_adaln = autograd.gated_residual_adaln(
    _native.op("gated_residual_adaln"), _both_gradients
)


def _gradient(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(x.shape if wanted else 0)


def _sums(x: Tensor, slots: int, wanted: bool) -> Tensor:
    return x.new_empty((slots, x.shape[0] + 1, x.shape[2]) if wanted else 0)


@torch.library.register_fake("ecar::adaln")
def _(x, shift, scale, step_shift, step_scale, eps):
    return x.new_empty(x.shape)


@torch.library.register_fake("ecar::gated_residual")
def _(x, branch, gate, step_gate):
    return x.new_empty(x.shape)


@torch.library.register_fake("ecar::gated_residual_adaln")
def _(x, branch, gate, shift, scale, step_gate, step_shift, step_scale, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("ecar::adaln_backward")
def _(grad_y, x, scale, step_scale, eps, scale_wanted, sums_wanted):
    return x.new_empty(x.shape), _gradient(x, scale_wanted), _sums(x, 2, sums_wanted)


@torch.library.register_fake("ecar::gated_residual_backward")
def _(grad_new_x, branch, gate, step_gate, gate_wanted, sums_wanted):
    gradients = branch.new_empty(branch.shape), _gradient(branch, gate_wanted)
    return *gradients, _sums(branch, 1, sums_wanted)


@torch.library.register_fake("ecar::gated_residual_adaln_backward")
def _(grad_new_x, grad_y, new_x, *others):
    *_, gate_wanted, scale_wanted, sums_wanted = others
    whole = new_x.new_empty(new_x.shape), new_x.new_empty(new_x.shape)
    parts = _gradient(new_x, gate_wanted), _gradient(new_x, scale_wanted)
    return *whole, *parts, _sums(new_x, 3, sums_wanted)

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


def _spatial(wanted: bool, whole: Tensor | None, sums: Tensor, slot: int) -> Tensor | None:
    """The gradient of [B, N, C], `whole`, or of [B, 1, C], out of sums [slots, B + 1, C]."""
    if not wanted:
        return None
    return sums[slot, :-1, None] if whole is None else whole


def _steps(wanted: Sequence[bool], shared: Sequence[bool], sums: Tensor) -> list[Tensor | None]:
    """The gradients of [1, 1, C], shared by all images, or of [B, 1, C]: sums over its images."""
    if not any(wanted):
        return [None] * len(wanted)
    of_all = sums[:, -1:, None].unbind(0)
    return [
        None if not wanted[i] else of_all[i] if shared[i] else sums[i, :-1, None]
        for i in range(len(wanted))
    ]


# Loops over two or three modulations are written out, for speed.
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
    return (
        grad_x,
        _spatial(shift_, saved[0] if whole_shift else None, sums, 0),
        _spatial(scale_, grad_scale if whole_scale else None, sums, 1),
        *_steps(steps_, shared, sums),
    )


def gated_residual_gradients(saved, wanted, whole, shared):
    _, gate_, step_ = wanted
    grad_branch, grad_gate, sums = _gated_residual_backward(
        *saved, gate_ and whole[0], step_ or (gate_ and not whole[0])
    )
    return (
        grad_branch,
        _spatial(gate_, grad_gate if whole[0] else None, sums, 0),
        *_steps((step_,), shared, sums),
    )


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
    return (
        grad_x,
        grad_branch,
        _spatial(gate_, grad_gate if whole_gate else None, sums, 0),
        _spatial(shift_, saved[1] if whole_shift else None, sums, 1),
        _spatial(scale_, grad_scale if whole_scale else None, sums, 2),
        *_steps(steps_, shared, sums),
    )


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

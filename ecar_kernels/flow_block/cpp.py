"""The fused GEMMs in C++, for CPU tensors: csrc/cpu/flow_block_isa.cpp.

One rule for every size, `by_cpp`, measured in November 2026 (EPYC of Zen 4, one
thread, weights from memory; of the best library's own rate at 512 rows, which oneDNN has):

    rows      nn.Linear   oneDNN packed   C++, all fused  therefore
    16        31-51 %     49-75 %         82-100 %          no library comes near 85 %
    64        55-76 %     79-94 %         87-101 %          oneDNN reaches it, without the fusion
    256, 512  72-93 %     96-100 %        90-98 %           what oneDNN gains is less than the
                                                            passes that would surround it cost
    bfloat16: 188-204 GFLOP/s fused against 84-208 of nn.Linear alone; float16: 87-102 against 20.

Weights are packed: see packing.py.
"""

import torch
from torch import Tensor

from ecar_kernels import _native
from ecar_kernels.adaln import cpp as unfused
from ecar_kernels.flow_block import autograd
from ecar_kernels.flow_block.packing import forget_packed, pack_weight, packed_size, packed_weight

__all__ = [
    "adaln_linear",
    "flow_block_",
    "forget_packed",
    "linear_gated_residual",
    "packed_weight",
    "prepare_weight",
    "stage_block_",
    "workspace_size",
]

_native.require()

_packed_adaln_linear = torch.ops.ecar.packed_adaln_linear.default
_packed_linear_gated_residual = torch.ops.ecar.packed_linear_gated_residual.default
# `FlowBlock.infer` in one call, for who has packed the weights and allocated the buffers
# (bound.py): x [R, N, C] is written over; spatial [R, N, parts C] and step [1, 1, parts C]
# hold the block's six modulations from `part` on; `wide`, of x's type, has R N max(4 C, hidden)
# elements or more, and `workspace`, floats, what `workspace_size` says of C and of `hidden`.
flow_block_ = torch.ops.ecar.flow_block_.default
# `StageBlock.forward` over a cache, likewise: keys and values [R, N, H, D] hold `begin` tokens of
# each row and are given those of x; `wide` has R n max(2 C, hidden) elements or more.
stage_block_ = torch.ops.ecar.stage_block_.default


def workspace_size(rows: int, depth: int) -> int:
    """Floats that the workspace of a call has at least: rows of all images, inputs of each."""
    return torch.ops.ecar.packed_workspace_size(rows, depth)


def prepare_weight(weight: Tensor, keep: bool) -> None:
    """Packs it ahead of time: beside the plain one, or, with keep False, in its place."""
    if keep or not pack_weight(weight):
        packed_weight(weight)


def _run_adaln_linear(
    x, shift, scale, weight, bias, step_shift, step_scale, gelu, eps, scale_offset
):
    outputs = _outputs("x", x, weight)
    return _packed_adaln_linear(
        x,
        shift,
        scale,
        packed_weight(weight),
        outputs,
        bias,
        step_shift,
        step_scale,
        gelu,
        eps,
        scale_offset,
    )


def _run_linear_gated_residual(h, weight, bias, gate, residual, step_gate):
    _outputs("h", h, weight)
    return _packed_linear_gated_residual(h, packed_weight(weight), bias, gate, residual, step_gate)


def _outputs(name: str, x: Tensor, weight: Tensor) -> int:
    """A packed weight does not tell an odd depth from the next even one."""
    outputs, depth = weight.shape
    if x.shape[-1] != depth:
        raise ValueError(
            f"argument '{name}': expected a last dimension of {depth} like "
            f"'weight', got {list(x.shape)}"
        )
    return outputs


# What a compiled graph calls: the cache is looked into when it runs, not when it is traced.
_library = torch.library.Library("ecar", "FRAGMENT")
_library.define(
    "adaln_linear(Tensor x, Tensor shift, Tensor scale, Tensor weight, Tensor? bias, "
    "Tensor? step_shift, Tensor? step_scale, bool gelu, float eps, "
    "float scale_offset) -> Tensor"
)
_library.define(
    "linear_gated_residual(Tensor h, Tensor weight, Tensor? bias, Tensor gate, "
    "Tensor residual, Tensor? step_gate) -> Tensor"
)
_library.impl("adaln_linear", _run_adaln_linear, "CPU")
_library.impl("linear_gated_residual", _run_linear_gated_residual, "CPU")
_adaln_linear = _native.op("adaln_linear")
_linear_gated_residual = _native.op("linear_gated_residual")


def _forward_adaln_linear(*arguments):
    call = _adaln_linear if torch.compiler.is_compiling() else _run_adaln_linear
    return call(*arguments)


def _forward_linear_gated_residual(*arguments):
    call = _linear_gated_residual if torch.compiler.is_compiling() else _run_linear_gated_residual
    return call(*arguments)


adaln_linear = autograd.adaln_linear(
    _forward_adaln_linear, unfused.adaln_forward, unfused.adaln_gradients, by_cpp=True
)
linear_gated_residual = autograd.linear_gated_residual(
    _forward_linear_gated_residual,
    unfused.gated_residual_forward,
    unfused.gated_residual_gradients,
    by_cpp=True,
)


@torch.library.register_fake("ecar::adaln_linear", lib=_library)
def _(x, shift, scale, weight, bias, step_shift, step_scale, gelu, eps, scale_offset):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("ecar::linear_gated_residual", lib=_library)
def _(h, weight, bias, gate, residual, step_gate):
    return h.new_empty(residual.shape)


@torch.library.register_fake("ecar::packed_adaln_linear", lib=_library)
def _(x, shift, scale, packed, outputs, bias, step_shift, step_scale, gelu, eps, scale_offset):
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.register_fake("ecar::packed_linear_gated_residual", lib=_library)
def _(h, packed, bias, gate, residual, step_gate):
    return h.new_empty(residual.shape)


@torch.library.register_fake("ecar::flow_block_", lib=_library)
def _(*arguments):
    return None


@torch.library.register_fake("ecar::stage_block_", lib=_library)
def _(*arguments):
    return None


@torch.library.register_fake("ecar::pack_linear_weight", lib=_library)
def _(weight):
    return weight.new_empty(packed_size(*weight.shape))


# GELU alone, and with its gradient, for training (recompute.py).


@torch.library.register_fake("ecar::gelu", lib=_library)
def _(x):
    return torch.empty_like(x)


@torch.library.register_fake("ecar::gelu_backward_", lib=_library)
def _(grad, x):
    return torch.empty_like(x)

"""The boundary between two network calls in CUDA C++: csrc/cuda/flow_boundary.cuh.

The op is that of the CPU by name, and PyTorch calls a device's own.
"""

import torch

from ecar_kernels import _native
from ecar_kernels.flow_boundary.cpp import bound, flow_boundary

__all__ = ["flow_boundary", "flow_boundary_chained"]

PART = 32  # channels of a part of the statistics: csrc/cuda/flow_step.h

_native.load_cuda()
# (state', embedded, statistics), then the velocity: those that `adaln_linear` takes with embedded.
flow_boundary_chained = bound("flow_boundary_chained")


@torch.library.register_fake("ecar::flow_boundary_chained")
def _fake(x, state, *arguments, **options):
    parts = -(-x.shape[2] // PART)
    statistics = x.new_empty((*x.shape[:2], 3, parts), dtype=torch.float32)
    return state.new_empty(state.shape), x.new_empty(x.shape), statistics


@torch.library.register_fake("ecar::flow_boundary_chained_velocity")
def _(x, state, *arguments, **options):
    return *_fake(x, state), state.new_empty(state.shape)

"""The boundary between two network calls in CUDA C++: csrc/cuda/flow_boundary.cuh.

The op is that of the CPU by name, and PyTorch calls a device's own.
"""

from ecar_kernels import _native
from ecar_kernels.flow_boundary.cpp import flow_boundary

__all__ = ["flow_boundary"]

_native.load_cuda()

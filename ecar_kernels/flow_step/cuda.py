"""The flow step in CUDA C++: csrc/cuda/flow_step.cu.

The ops are those of the CPU by name, and PyTorch calls a device's own.
"""

from ecar_kernels import _native
from ecar_kernels.flow_step.cpp import euler_step, initial_noise, upsample_renoise_euler

__all__ = ["euler_step", "initial_noise", "upsample_renoise_euler"]

_native.load_cuda()

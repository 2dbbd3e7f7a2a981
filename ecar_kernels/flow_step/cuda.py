"""The flow step in CUDA C++: csrc/cuda/flow_step.cu.

The ops are those of the CPU by name, and PyTorch calls a device's own.
"""

from torch import Tensor

from ecar_kernels import _native
from ecar_kernels.flow_step import autograd, cpp
from ecar_kernels.flow_step.cpp import initial_noise

__all__ = ["euler_step", "initial_noise", "upsample_renoise_euler"]

_native.load_cuda()


def scale_on_device(scale: float | Tensor) -> tuple[float, Tensor | None]:
    """A guidance scale as the ops take it: a number, or a tensor that stays on its GPU unread."""
    return (1.0, scale) if isinstance(scale, Tensor) else (scale, None)


euler_step = autograd.euler_step(cpp.step(scale_on_device))
upsample_renoise_euler = autograd.upsample_renoise_euler(cpp.jump(scale_on_device))

"""The boundary between two network calls in CUDA C++: csrc/cuda/flow_boundary.cuh."""

from ecar_kernels import _native
from ecar_kernels.flow_boundary.cpp import boundary
from ecar_kernels.flow_step.cuda import scale_on_device

_native.load_cuda()

flow_boundary = boundary(scale_on_device)

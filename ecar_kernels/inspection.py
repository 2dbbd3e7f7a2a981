"""What code that is built on these ops may ask of modules, and of the machine.

Code that reads a layer's parameters in the place of calling it asks `why_not_as_written` or
`as_written` first, on every run: people put adapters in a layer's place, hook it, quantize it.
"""

from ecar_kernels import _native, _transforms, _triton
from ecar_kernels._written import address, as_written, is_plain
from ecar_kernels._written import why_not as why_not_as_written
from ecar_kernels.registry import why_not_bfloat16

__all__ = [
    "address",
    "as_written",
    "in_transform",
    "is_plain",
    "why_not_as_written",
    "why_not_bfloat16",
    "why_not_cuda",
    "why_not_triton",
]


def in_transform() -> bool:
    """Is a transform of torch.func active in this thread, or a level of forward-mode AD in any?

    Kernels see neither the one's wrappers nor the other's tangents; the ops are then served by
    their references.
    """
    return _transforms.active()


def why_not_cuda() -> str | None:
    """None where the C++ library's CUDA half serves CUDA tensors, else what is missing."""
    return _native.why_not_cuda()


def why_not_triton() -> str | None:
    """None where Triton's kernels serve CUDA tensors, else what is missing."""
    return _triton.why_not()

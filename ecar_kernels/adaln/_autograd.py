"""What the autograd of the family's backends shares."""

import torch
from torch import Tensor


def any_requires_grad(*tensors: Tensor | None) -> bool:
    for tensor in tensors:  # noqa: SIM110 (half the time of any() over a generator)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def rows_of(gradient: Tensor) -> Tensor:
    """A gradient as the kernels take it: that of a sum, say, is expanded from one number."""
    return gradient if gradient.stride(-1) == 1 else gradient.contiguous()


def shape_of(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape

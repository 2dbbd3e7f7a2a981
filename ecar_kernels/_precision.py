"""The precision that every reference computes in."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the 16-bit types, the type itself for float32 and float64."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def widen(x: Tensor) -> Tensor:
    """`x` in its accumulation type."""
    return x.to(accumulation_dtype(x.dtype))

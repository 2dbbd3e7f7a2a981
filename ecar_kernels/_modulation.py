"""Separable adaLN modulation (design: the part of the token plus the part of the step)."""

from torch import Tensor

from ecar_kernels._precision import widen


def combine(spatial: Tensor, step: Tensor | None) -> Tensor:
    """spatial [B, N, C] or [B, 1, C], plus step [1, 1, C] or [B, 1, C], in the wide type.

    The result broadcasts against tokens [B, N, C].
    """
    return widen(spatial) if step is None else widen(spatial) + widen(step)

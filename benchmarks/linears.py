"""Ways to compute a linear layer alone, x weight^T + bias: the libraries', and our packed GEMM."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ecar_kernels import _native

Linear = Callable[[Tensor], Tensor]


def libraries(weight: Tensor, bias: Tensor, rows: int) -> dict[str, Linear]:
    """The paths that torch exposes, for x [1, rows, K]; packing is done here."""
    found: dict[str, Linear] = {"nn.Linear": lambda x: F.linear(x, weight, bias)}
    mkl = weight.dtype == torch.float32 and torch.backends.mkl.is_available()
    if mkl and hasattr(torch.ops.mkl, "_mkl_reorder_linear_weight"):
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        found["MKL packed"] = lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, bias, rows)
    if (onednn := _onednn(weight, bias, rows)) is not None:
        found["oneDNN packed"] = onednn
    return found


def fastest_alone(weight: Tensor, bias: Tensor, rows: int) -> dict[str, Linear]:
    """The paths among which the fastest counts as this GEMM's own time.

    Ours is the op that the flow block uses, with a neutral epilogue: a gate of one and a zero
    residual, both of one row that stays in the cache.
    """
    found: dict[str, Linear] = {"nn.Linear": lambda x: F.linear(x, weight, bias)}
    if (onednn := _onednn(weight, bias, rows)) is not None:
        found["oneDNN packed"] = onednn
    if _native.why_not() is None:
        found["ours packed"] = ours(weight, bias, rows)
    return found


def _onednn(weight: Tensor, bias: Tensor, rows: int) -> Linear | None:
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_reorder_linear_weight"
    ):
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def ours(weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
    """The op that the flow block uses, with a gate of one and a residual of zero."""
    from ecar_kernels.flow_block import packing

    run = torch.ops.ecar.packed_linear_gated_residual.default
    packed, outputs = packing.packed_weight(weight), weight.shape[0]
    gate = torch.ones(1, 1, outputs, dtype=weight.dtype)
    residual = torch.zeros(1, 1, outputs, dtype=weight.dtype).expand(1, rows, outputs)
    return lambda x: run(x, packed, bias, gate, residual, None)

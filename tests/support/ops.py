"""Valid arguments for every op, by name: what the tests that hold for all ops start from."""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import ecar_kernels
from ecar_kernels.registry import FAMILIES
from ecar_kernels.testing import (  # noqa: F401
    CHANNELS,
    CONTIGUOUS,
    DIFFERENTIABLE,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    IMAGE,
    INFERENCE_ONLY,
    OUTPUTS,
    STAGES,
    TOKENS,
    arguments,
    tensor_names,
)

FAMILY = {op: family for family, ops in FAMILIES.items() for op in ops}


def function(op: str) -> Callable:
    """The public op."""
    return getattr(ecar_kernels, op)


def opcheck(op: Callable, args: Sequence) -> None:
    """Of a registered op, and of its twin that takes tensors for floats (_numbers.py)."""
    torch.library.opcheck(inspect.unwrap(op), tuple(args))
    if hasattr(op, "opened"):
        values = [torch.tensor(v, dtype=torch.float64) if type(v) is float else v for v in args]
        torch.library.opcheck(op.opened, tuple(values))


def small_arguments(op: str, *, dtype: torch.dtype = torch.float32, optional: bool = True) -> dict:
    """Few enough numbers for whole Jacobians; what backends ask of sizes still holds."""
    call = arguments(op, dtype=dtype, optional=optional)
    if op == "stage_attention":
        return {name: call[name][:, :5, :1].contiguous() for name in "qkv"} | {
            "stage_lengths": (1, 4)
        }
    for name in tensor_names(op):
        if name not in call:
            continue
        value = call[name]
        if op in FAMILIES["flow_step"] and op != "flow_boundary":
            value = value[:, :1, ..., :2, :3]
        elif value.ndim == 3:
            value = value[:, :3, :8]
        elif name == "positions":
            value = value[:3, :8]
        else:
            value = value[:8, :8] if value.ndim == 2 else value[:8]
        call[name] = value.contiguous()
    return call


def without_tokens(op: str) -> dict:
    """The arguments cut to no tokens; of attention to no heads, of an image to no rows."""

    def cut(name, value):
        if name == "positions":
            return value[:0]
        if isinstance(value, Tensor) and value.ndim >= 4:
            return value[..., :0, :]
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == TOKENS:
            return value[:, :0]
        return value

    return {name: cut(name, value) for name, value in arguments(op).items()}

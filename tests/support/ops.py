"""Valid arguments for every op, by name: what the tests that hold for all ops start from."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import ecar_kernels
from ecar_kernels.registry import FAMILIES, RECORDS
from ecar_kernels.testing import (  # noqa: F401
    DIFFERENTIABLE,
    INFERENCE_ONLY,
    SIZES,
    SampleSizes,
    arguments,
    tensor_names,
)

FAMILY = {op: family for family, ops in FAMILIES.items() for op in ops}
# Few enough numbers for whole Jacobians; what backends ask of sizes still holds.
SMALL = SampleSizes(
    stages=(1, 4), heads=1, head_dim=8, channels=8, hidden=8, outputs=8, image=(1, 2, 3)
)


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
    call = arguments(op, dtype=dtype, optional=optional, sizes=SMALL)
    return {
        name: value.contiguous() if isinstance(value, Tensor) else value
        for name, value in call.items()
    }


def without_tokens(op: str) -> dict:
    """No tokens; of attention no heads, of an image no rows."""
    record = RECORDS[op]
    if not record.tensor_names:
        return arguments(op)
    if record.width == "":
        return arguments(op, sizes=replace(SIZES, image=(3, 0, 6)))
    if any(argument.name == "stage_lengths" for argument in record.arguments):
        return arguments(op, sizes=replace(SIZES, heads=0))
    return arguments(op, sizes=replace(SIZES, stages=()))

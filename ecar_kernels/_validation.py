"""Argument checks that every op shares. Messages name the argument, what was expected, what came.

They run on each call, so they are plain comparisons that torch.compile traces with dynamic
shapes; text is built only when something is wrong. Values have the types that the ops declare;
the checks are for callers that do not.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeGuard, TypeVar

import torch
from torch import Tensor

from ecar_kernels import _transforms, registry

_INFINITY = float("inf")

P = ParamSpec("P")
R = TypeVar("R")


def shape_error(name: str, value: Tensor, expected: str, **sizes: int) -> ValueError:
    """The error for a tensor whose shape is not `expected`, given what the letters stand for."""
    known = ", ".join(f"{letter}={size}" for letter, size in sizes.items())
    return ValueError(
        f"argument '{name}': expected a tensor of shape {expected}"
        f"{' with ' + known if known else ''}, got {list(value.shape)}"
    )


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"argument '{name}': expected a tensor, got {type(value).__name__}")


def check_dtype(name: str, dtype: object) -> None:
    """A floating type that the ops serve, or the references alone."""
    if dtype not in registry.KERNEL_DTYPES and dtype is not torch.float64:
        raise TypeError(
            f"argument '{name}': expected torch.float32, torch.bfloat16, "
            f"torch.float16 or torch.float64, got {dtype}"
        )


def check_device(name: str, device: object) -> torch.device:
    """A device, its name or its index."""
    if isinstance(device, (torch.device, str)) or type(device) is int:
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"argument '{name}': expected a device, got {device!r}") from error
    raise TypeError(
        f"argument '{name}': expected a torch.device or its name, got {type(device).__name__}"
    )


def check_last_dim(name: str, value: Tensor) -> None:
    # Under vmap, how a slice lies is not the caller's choice, and the reference takes any layout.
    if value.stride(-1) != 1 and value.shape[-1] > 1 and not _transforms.active():
        raise ValueError(
            f"argument '{name}': expected a tensor whose last dimension is "
            f"contiguous, got strides {list(value.stride())}"
        )


def check_leading(name: str, value: Tensor, layout: str) -> None:
    """The tensor that sets type and device; `layout` is its shape's letters, "[B, N, C]"."""
    check_tensor(name, value)
    check_dtype(name, value.dtype)
    if value.ndim != layout.count(",") + 1:
        raise shape_error(name, value, layout)
    check_last_dim(name, value)


def check_like(name: str, value: Tensor, leading_name: str, leading: Tensor) -> None:
    """Type and device of the leading tensor, last dimension contiguous; shapes are the op's."""
    check_tensor(name, value)
    if value.dtype != leading.dtype:
        raise TypeError(
            f"argument '{name}': expected {leading.dtype} like '{leading_name}', got {value.dtype}"
        )
    if value.device != leading.device:
        raise ValueError(
            f"argument '{name}': expected a tensor on {leading.device} like "
            f"'{leading_name}', got {value.device}"
        )
    if value.ndim:
        check_last_dim(name, value)


def check_spatial(name: str, value: Tensor, x_name: str, x: Tensor) -> None:
    """Modulation of tokens x [B, N, C]: [B, N, C] or [B, 1, C]."""
    check_like(name, value, x_name, x)
    if value.shape == x.shape:
        return
    batch, tokens, channels = x.shape
    if value.shape != (batch, 1, channels):
        raise shape_error(name, value, "[B, N, C] or [B, 1, C]", B=batch, N=tokens, C=channels)


def check_step(name: str, value: Tensor | None, x_name: str, x: Tensor) -> None:
    """A step's part of the modulation, or None: [1, 1, C] or [B, 1, C]."""
    if value is None:
        return
    check_like(name, value, x_name, x)
    batch, _, channels = x.shape
    if value.shape != (1, 1, channels) and value.shape != (batch, 1, channels):
        raise shape_error(name, value, "[1, 1, C] or [B, 1, C]", B=batch, C=channels)


def check_number(name: str, value: object) -> None:
    """A finite Python number."""
    if isinstance(value, bool) or not isinstance(value, (float, int)):
        raise TypeError(f"argument '{name}': expected a float, got {type(value).__name__}")
    if not -_INFINITY < value < _INFINITY:
        raise ValueError(f"argument '{name}': expected a finite number, got {value}")


def check_number_or_data(name: str, value: object, leading: Tensor, leading_name: str) -> None:
    """A finite Python number, or one float32 on the leading tensor's device, read when the op runs:
    a 0-dim tensor without a gradient."""
    if not isinstance(value, Tensor) or value.ndim != 0:
        check_number(name, value)
    elif value.dtype != torch.float32:
        raise TypeError(
            f"argument '{name}': expected a float or a 0-dim torch.float32 tensor, "
            f"got {value.dtype}"
        )
    elif value.device != leading.device:
        raise ValueError(
            f"argument '{name}': expected a tensor on {leading.device} like '{leading_name}', "
            f"got {value.device}"
        )
    elif value.requires_grad:
        raise ValueError(
            f"argument '{name}': expected a tensor without a gradient, got one that requires grad"
        )


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"argument '{name}': expected True or False, got {type(value).__name__}")


def check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"argument '{name}': expected a positive number, got {value}")


def check_count(name: str, value: object) -> None:
    """A Python integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"argument '{name}': expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"argument '{name}': expected at least 1, got {value}")


def check_inference(**tensors: Tensor | None) -> None:
    """For ops without a derivative: none may be asked for.

    One that is asked for from outside a vmap is not seen in it; then the reference answers.
    """
    if torch.is_grad_enabled():
        for name, value in tensors.items():
            if value is not None and value.requires_grad:
                raise ValueError(
                    f"argument '{name}': requires grad, but this op is for inference only; "
                    "call it under torch.no_grad(), or use the ops that it is composed of"
                )
    if _transforms.active():
        for name, value in tensors.items():
            if value is not None and _transforms.has_tangent(value):
                raise ValueError(
                    f"argument '{name}': has a tangent, but this op is for inference only; "
                    "use the ops that it is composed of"
                )


def _autocast(op: Callable[P, R], widest: bool, kept: tuple[str, ...] = ()) -> Callable[P, R]:
    names = tuple(inspect.signature(op).parameters)

    @functools.wraps(op)
    def cast(*args: P.args, **kwargs: P.kwargs) -> R:
        values = (*args, *kwargs.values())
        device = None
        for value in values:  # next() over a generator takes longer
            if isinstance(value, Tensor):
                device = value.device.type
                break
        # torch raises for "meta", a device that autocast does not know.
        if device in (None, "meta") or not torch.is_autocast_enabled(device):
            return op(*args, **kwargs)
        target = torch.get_autocast_dtype(device)
        if widest:
            target = functools.reduce(
                torch.promote_types, (value.dtype for value in values if _is_floating(value))
            )

        def convert(name: str, value: Any) -> Any:
            return value.to(target) if name not in kept and _is_floating(value) else value

        with torch.autocast(device, enabled=False):
            return op(
                *map(convert, names, args),
                **{name: convert(name, value) for name, value in kwargs.items()},
            )

    return cast


def _is_floating(value: Any) -> TypeGuard[Tensor]:
    """What autocast converts: tensors of the ops' types, so not float64, nor a 0-dim number."""
    return isinstance(value, Tensor) and value.dtype in registry.KERNEL_DTYPES and value.ndim > 0


def autocast_low(op: Callable[P, R], kept: tuple[str, ...] = ()) -> Callable[P, R]:
    """Under torch.autocast, run `op` in the autocast type, as matrix products do.

    kept: the arguments that keep their type.
    """
    return _autocast(op, widest=False, kept=kept)


def autocast_widest(op: Callable[P, R]) -> Callable[P, R]:
    """Under torch.autocast, run `op` in its arguments' widest type, as additions do."""
    return _autocast(op, widest=True)

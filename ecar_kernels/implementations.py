"""A backend's implementation of an op: where it is, what it serves, and the op bound to it."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ecar_kernels import _numbers

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*KERNEL_DTYPES, torch.float64)  # of every reference


def load(target: str) -> Any:
    """The object named "module:name"."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def _always_available() -> str | None:
    return None


@dataclass
class Implementation:
    """One backend's implementation of one op, and what it serves."""

    target: str  # "module:function", imported on first use
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    dtypes_on: dict[str, tuple[torch.dtype, ...]] = field(default_factory=dict)  # fewer, there
    devices: tuple[str, ...] | None = None  # None: any
    max_width: int | None = None  # largest last dimension; None: any
    width_step: int = 1  # the last dimension is a multiple of it
    named_only: tuple[str, ...] = ()  # devices that it serves only where asked for by name
    missing: Callable[[], str | None] = _always_available  # what this machine lacks
    # what this machine lacks for one of the devices
    missing_on: dict[str, Callable[[], str | None]] = field(default_factory=dict)
    prepare: str = ""  # "module:function" of (weight, keep), where it packs weights
    # "module:function" of the target's signature, without gradients, with what one op can leave for
    # the next: adaln_linear takes (.., *, statistics=None, keys=None, values=None), of which x's
    # statistics come with x, and the last two thirds of the outputs go to keys and values;
    # linear_gated_residual returns (x, statistics or None), flow_boundary them behind the tokens
    chained: str = ""
    auto: str = ""  # "module:function" of the target's signature, which serves in its place where
    # no backend is named: it takes this one or another for each call, and notes which
    composed: bool = False  # of ops that torch.compile sees, with numbers that are constants to it
    gradients_vary: bool = False  # in their last bits, from call to call
    op: str = ""  # the op's name and the backend's, which its family fills in
    backend: str = ""

    @functools.cached_property
    def function(self) -> Callable:
        """The loaded target: the op's signature, no validation."""
        return load(self.target)

    @functools.cached_property
    def loaded(self) -> "BoundOp":
        return BoundOp(self, self.function)

    @functools.cached_property
    def unnamed(self) -> "BoundOp":
        """What serves where no backend is named."""
        return BoundOp(self, load(self.auto), chooses=True) if self.auto else self.loaded

    @functools.cached_property
    def compiled(self) -> "BoundOp":
        """The same as a graph of torch.compile calls it, which may leave numbers open."""
        if self.backend == "reference" or self.composed:
            return self.loaded
        return BoundOp(self, _numbers.opening(self.function))

    def why_not(self, device_type: str, dtype: torch.dtype) -> str | None:
        """None where it can serve, else the reason."""
        if (reason := self.missing()) is not None:
            return reason
        if self.devices is not None and device_type not in self.devices:
            return f"it serves {' and '.join(self.devices)} tensors, not {device_type}"
        if dtype not in self.dtypes_on.get(device_type, self.dtypes):
            return f"it does not serve {dtype}"
        return self.missing_on.get(device_type, _always_available)()

    def why_not_width(self, width: int) -> str | None:
        """None where it can serve this last dimension, else the reason."""
        if self.max_width is not None and width > self.max_width:
            return f"it serves a last dimension of at most {self.max_width}, not {width}"
        if self.width_step > 1 and width % self.width_step:
            return f"it serves a last dimension in steps of {self.width_step}, not {width}"
        return None

    def limits(self) -> str:
        """What it serves, in words: "cuda tensors; last dimension at most 8192"."""
        said = [] if self.devices is None else [f"{' and '.join(self.devices)} tensors"]
        widths = [] if self.max_width is None else [f"at most {self.max_width}"]
        if self.width_step > 1:
            widths.append(f"in steps of {self.width_step}")
        if widths:
            said.append(f"last dimension {', '.join(widths)}")
        if not set(KERNEL_DTYPES) <= set(self.dtypes):
            said.append(_names(self.dtypes))
        said += [f"{_names(dtypes)} on {device}" for device, dtypes in self.dtypes_on.items()]
        if self.gradients_vary:
            said.append("gradients vary in their last bits from call to call")
        said += [
            f"not {device}: {reason}"
            for device, missing in self.missing_on.items()
            if (reason := missing()) is not None
        ]
        return "; ".join(said)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


class BoundOp:
    """An op on one backend, called with the op's signature.

    It neither validates, casts nor looks anything up: arguments must meet the op's contract.

    op, backend: their names. function: what a call runs. limits: what the backend serves, in
    words. prepare_weight: a function of (weight, keep) that packs a weight ahead of its first use,
    next to the plain one or, with keep False, in its place; None where weights are used as they
    are. chained: the op for inference, with what one op leaves for the next, or None; see
    `Implementation`. chooses: the function takes another backend where `ecar tune` measured it to
    be faster.
    """

    __slots__ = (
        "backend",
        "chained",
        "chooses",
        "function",
        "implementation",
        "op",
        "prepare_weight",
    )

    def __init__(
        self, implementation: Implementation, function: Callable, *, chooses: bool = False
    ) -> None:
        self.implementation, self.function, self.chooses = implementation, function, chooses
        self.op, self.backend = implementation.op, implementation.backend
        self.prepare_weight = load(implementation.prepare) if implementation.prepare else None
        self.chained = load(implementation.chained) if implementation.chained else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    @property
    def limits(self) -> str:
        return self.implementation.limits()

    def __repr__(self) -> str:
        return f"<{self.op} by {self.backend}>"

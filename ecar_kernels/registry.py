"""Which backend serves an op: what each can do, why not, and which one is asked for.

State is process-wide and plain, so that torch.compile and torch.export see through it: a
compiled graph guards on the active backend's name and holds the implementation as a constant.
"""

import importlib
import os
from collections.abc import Callable, Container
from dataclasses import dataclass

import torch

BACKENDS = ("reference", "native", "triton")
AUTO_ORDER = ("triton", "native", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENVIRONMENT_VARIABLE = "ECAR_BACKEND"


class BackendUnavailableError(RuntimeError):
    """A backend asked for by name cannot serve the op; the message says why."""


def _always_available() -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One backend's implementation of one op, and what it can serve."""

    target: str  # "module:function", imported on first use
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    devices: tuple[str, ...] | None = None  # None: any
    widths: Container[int] | None = None  # sizes of the last dimension; None: any
    missing: Callable[[], str | None] = _always_available  # what this machine lacks

    def why_not(self, device_type: str, dtype: torch.dtype, width: int | None) -> str | None:
        """None where it can serve, else the reason."""
        if (reason := self.missing()) is not None:
            return reason
        if self.devices is not None and device_type not in self.devices:
            return f"it serves {' and '.join(self.devices)} tensors, not {device_type}"
        if dtype not in self.dtypes:
            return f"it does not serve {dtype}"
        if self.widths is not None and width is not None and width not in self.widths:
            return f"it does not serve a last dimension of {width}"
        return None

    def load(self) -> Callable:
        """The function, with the public op's signature and no validation."""
        module, function = self.target.split(":")
        return getattr(importlib.import_module(module), function)


FAMILIES = {
    "stage_attention": ("stage_attention",),
    "adaln": ("adaln", "gated_residual", "gated_residual_adaln"),
    "flow_block": ("adaln_linear", "linear_gated_residual"),
    "flow_step": ("euler_step", "upsample_renoise_euler", "initial_noise"),
}
OPS = tuple(op for family in FAMILIES.values() for op in family)

IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {
    op: {"reference": Implementation(f"ecar_kernels.{family}.reference:{op}",
                                     dtypes=(*KERNEL_DTYPES, torch.float64))}
    for family, ops in FAMILIES.items() for op in ops
}
IMPLEMENTATIONS["stage_attention"]["native"] = Implementation(
    "ecar_kernels.stage_attention.native:stage_attention")

_active = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
_resolved: dict[tuple, Callable] = {}


def _check_backend(name: str, source: str) -> None:
    if name not in (*BACKENDS, "auto"):
        expected = ", ".join(repr(backend) for backend in (*BACKENDS, "auto"))
        raise ValueError(f"{source}: expected one of {expected}, got {name!r}")


def active_backend() -> str:
    """The backend in force: the innermost `use_backend`, else $ECAR_BACKEND, else "auto"."""
    return _active


class use_backend:
    """Context manager: serve every op from one backend.

    "reference", "native" and "triton" never fall back: an op that the backend cannot serve
    raises `BackendUnavailableError`. "auto" takes the first of triton, native and reference
    that can. The choice is process-wide (all threads) and ends with the block; the environment
    variable ECAR_BACKEND sets the one outside every block.
    """

    def __init__(self, name: str):
        _check_backend(name, "argument 'name'")
        self.name = name
        self._previous: list[str] = []

    def __enter__(self) -> "use_backend":
        global _active
        self._previous.append(_active)
        _active = self.name
        return self

    def __exit__(self, *exception: object) -> None:
        global _active
        _active = self._previous.pop()


def why_not(op: str, backend: str, device_type: str, dtype: torch.dtype,
            width: int | None = None) -> str | None:
    """None where the backend can serve the op, else the reason."""
    implementation = IMPLEMENTATIONS[op].get(backend)
    if implementation is None:
        return f"this version has no {backend} implementation of {op}"
    return implementation.why_not(device_type, dtype, width)


def _find(op: str, backend: str, device_type: str, dtype: torch.dtype,
          width: int | None) -> Callable:
    _check_backend(backend, f"environment variable {ENVIRONMENT_VARIABLE}")
    reasons = []
    for name in AUTO_ORDER if backend == "auto" else (backend,):
        reason = why_not(op, name, device_type, dtype, width)
        if reason is None:
            return IMPLEMENTATIONS[op][name].load()
        reasons.append(f"backend '{name}' cannot serve {op}: {reason}")
    raise BackendUnavailableError("; ".join(reasons))


def _implementation(op: str, backend: str, device_type: str, dtype: torch.dtype,
                    width: int | None) -> Callable:
    key = (op, backend, device_type, dtype, width)
    found = _resolved.get(key)
    if found is None:
        found = _resolved[key] = _find(*key)
    return found


# As torch.compiler.assume_constant_result does, which would import torch._dynamo (seconds).
_implementation._dynamo_marked_constant = True


def implementation(op: str, device_type: str, dtype: torch.dtype,
                   width: int | None = None) -> Callable:
    """The active backend's implementation of an op; one dictionary look-up a call."""
    return _implementation(op, _active, device_type, dtype, width)


def resolve(op: str, *, device: torch.device | str, dtype: torch.dtype,
            backend: str | None = None, width: int | None = None) -> Callable:
    """Bind an op's implementation ahead of time.

    op: a name out of `OPS`. backend: None for the active one. width: the last dimension's size
    (D of stage_attention, C of the others), where a backend's limits depend on it. Returns a
    function with the op's signature that neither validates, casts nor looks anything up:
    its arguments must meet the op's contract. Raises ValueError for an unknown op or backend,
    BackendUnavailableError where the backend cannot serve it.
    """
    if op not in IMPLEMENTATIONS:
        raise ValueError(f"argument 'op': expected one of {', '.join(OPS)}, got {op!r}")
    if backend is not None:
        _check_backend(backend, "argument 'backend'")
    return _implementation(op, _active if backend is None else backend,
                           torch.device(device).type, dtype, width)


@dataclass(frozen=True)
class Availability:
    """One row of `backends()`."""

    op: str
    backend: str
    available: bool
    why_not: str


def backends() -> list[Availability]:
    """Every op and backend on this machine: available for some tensor, or why not."""
    rows = []
    for op in OPS:
        for backend in BACKENDS:
            found = IMPLEMENTATIONS[op].get(backend)
            reason = (f"this version has no {backend} implementation of {op}" if found is None
                      else found.missing())
            rows.append(Availability(op, backend, reason is None, reason or ""))
    return rows

"""Which backend serves an op: what each can do, why not, and which one is asked for.

The choice is a context variable: threads and asyncio tasks have each their own. torch.compile
cannot read those before 2.14, so it guards on a plain name, that of the block entered last in any
thread, and takes the choice as a constant.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from ecar_kernels import _native, _numbers, _transforms, _triton

BACKENDS = ("reference", "native", "triton")
AUTO_ORDER = ("triton", "native", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENVIRONMENT_VARIABLE = "ECAR_BACKEND"


class BackendUnavailableError(RuntimeError):
    """A backend asked for by name cannot serve the op; the message says why."""


def _always_available() -> str | None:
    return None


@dataclass
class Implementation:
    """One backend's implementation of one op, and what it can serve."""

    target: str  # "module:function", imported on first use
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    devices: tuple[str, ...] | None = None  # None: any
    max_width: int | None = None  # largest last dimension; None: any
    width_step: int = 1  # the last dimension is a multiple of it
    named_only: tuple[str, ...] = ()  # devices that it serves only where asked for by name
    missing: Callable[[], str | None] = _always_available  # what this machine lacks
    # what this machine lacks for one of the devices
    missing_on: dict[str, Callable[[], str | None]] = field(default_factory=dict)
    backend: str = ""  # its own name
    function: Callable | None = None  # the loaded target: the op's signature, no validation
    compiled: Callable | None = None  # the same as a graph of torch.compile calls it
    bound: Callable | None = None  # what `resolve` gives: it, or the reference under a transform

    def why_not(self, device_type: str, dtype: torch.dtype) -> str | None:
        """None where it can serve, else the reason."""
        if (reason := self.missing()) is not None:
            return reason
        if self.devices is not None and device_type not in self.devices:
            return f"it serves {' and '.join(self.devices)} tensors, not {device_type}"
        if dtype not in self.dtypes:
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
            said.append(" and ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes))
        said += [
            f"not {device}: {reason}"
            for device, missing in self.missing_on.items()
            if (reason := missing()) is not None
        ]
        return "; ".join(said)

    def load(self) -> None:
        if self.function is None:
            module, name = self.target.split(":")
            self.function = getattr(importlib.import_module(module), name)
            self.compiled = self.function
            if self.backend != "reference":  # whose arithmetic torch.compile sees
                self.compiled = _numbers.opening(self.function)
            self.bound = _unless_transformed(self, name)
            if self.backend:  # one that was put in the table
                _backends_of[self.function] = _backends_of[self.bound] = self.backend


def _unless_transformed(served: Implementation, op: str) -> Callable:
    """The function of a bound op, which the registry is not asked for call by call."""
    found = IMPLEMENTATIONS[op]["reference"]
    found.load()
    reference, active = found.function, _transforms.active  # looked up here, not in each call
    function, compiled, compiling = served.function, served.compiled, torch.compiler.is_compiling
    if function is reference:
        return function

    @functools.wraps(function)
    def bound(*args, **kwargs):
        if active():
            return reference(*args, **kwargs)
        return compiled(*args, **kwargs) if compiling() else function(*args, **kwargs)

    return bound


_backends_of: dict[Callable, str] = {}

FAMILIES = {
    "stage_attention": ("stage_attention",),
    "adaln": ("adaln", "gated_residual", "gated_residual_adaln"),
    "flow_block": ("adaln_linear", "linear_gated_residual"),
    "flow_step": ("euler_step", "upsample_renoise_euler", "initial_noise", "flow_boundary"),
}
OPS = tuple(op for family in FAMILIES.values() for op in family)

IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {
    op: {
        "reference": Implementation(
            f"ecar_kernels.{family}.reference:{op}", dtypes=(*KERNEL_DTYPES, torch.float64)
        )
    }
    for family, ops in FAMILIES.items()
    for op in ops
}
IMPLEMENTATIONS["stage_attention"]["native"] = Implementation(
    "ecar_kernels.stage_attention.native:stage_attention", missing_on={"cpu": _native.why_not}
)
for op in FAMILIES["flow_step"]:
    IMPLEMENTATIONS[op]["native"] = Implementation(
        f"ecar_kernels.flow_step.native:{op}",
        devices=("cpu", "cuda"),
        missing=_native.why_not,
        missing_on={"cuda": _native.why_not_cuda},
    )
IMPLEMENTATIONS["flow_boundary"]["native"] = Implementation(
    "ecar_kernels.flow_step.boundary:flow_boundary",
    devices=("cpu", "cuda"),
    max_width=8192,
    missing=_native.why_not,
    missing_on={"cuda": _native.why_not_cuda},
)
for family in ("adaln", "flow_block"):
    for op in FAMILIES[family]:
        IMPLEMENTATIONS[op]["native"] = Implementation(
            f"ecar_kernels.{family}.native:{op}", devices=("cpu",), missing=_native.why_not
        )
# Interpreted, Triton's kernels serve CPU tensors too, but so slowly that none gets them unasked.
_TRITON_DEVICES = ("cuda", "cpu") if _triton.interpreting() else ("cuda",)
_TRITON = {
    "devices": _TRITON_DEVICES,
    "named_only": _TRITON_DEVICES if _triton.interpreting() else (),
    "missing": _triton.why_not,
}
IMPLEMENTATIONS["stage_attention"]["triton"] = Implementation(
    "ecar_kernels.stage_attention.triton:stage_attention", max_width=256, width_step=8, **_TRITON
)
for op in FAMILIES["adaln"]:
    IMPLEMENTATIONS[op]["triton"] = Implementation(
        f"ecar_kernels.adaln.triton:{op}", max_width=8192, **_TRITON
    )
for op in FAMILIES["flow_block"]:
    IMPLEMENTATIONS[op]["triton"] = Implementation(
        f"ecar_kernels.flow_block.triton:{op}", **_TRITON
    )

for _implementations in IMPLEMENTATIONS.values():
    for _name, _implementation in _implementations.items():
        _implementation.backend = _name

_outside = os.environ.get(ENVIRONMENT_VARIABLE, "auto")  # in force outside every block
_active: ContextVar[str | None] = ContextVar("ecar_kernels_backend", default=None)
_log: ContextVar[dict[str, set[str]] | None] = ContextVar("ecar_kernels_log", default=None)
_blocks: list[list[str]] = []  # of all threads, those entered and not left yet; one name in each
_traced = _outside  # the last block's, for torch.compile
_servers: dict[tuple, tuple[str, ...]] = {}


def _check_backend(name: str, source: str) -> None:
    if name not in (*BACKENDS, "auto"):
        expected = ", ".join(repr(backend) for backend in (*BACKENDS, "auto"))
        raise ValueError(f"{source}: expected one of {expected}, got {name!r}")


def active_backend() -> str:
    """The backend in force: the innermost `use_backend`, else $ECAR_BACKEND, else "auto".

    Raises ValueError for an unknown name in the environment variable: importing never does.
    """
    name = _current()
    _check_backend(name, f"environment variable {ENVIRONMENT_VARIABLE}")
    return name


def _current() -> str:
    if torch.compiler.is_compiling():
        return _traced
    return _active.get() or _outside


class use_backend:
    """Context manager: serve every op from one backend.

    "reference", "native" and "triton" never fall back: an op that the backend cannot serve
    raises `BackendUnavailableError`. "auto" takes the first of triton, native and reference
    that can. The choice holds for the block's thread or asyncio task, as torch.no_grad does, and
    ends with the block; graphs of torch.compile follow the block entered last in any thread. The
    environment variable ECAR_BACKEND sets the choice outside every block.
    """

    def __init__(self, name: str):
        _check_backend(name, "argument 'name'")
        self.name = name
        self._entered: list[tuple[str | None, list[str]]] = []

    def __enter__(self) -> "use_backend":
        before = None
        if not torch.compiler.is_compiling():
            before = _active.get()
            _active.set(self.name)
        block = [self.name]
        self._entered.append((before, block))
        _enter(block)
        return self

    def __exit__(self, *exception: object) -> None:
        before, block = self._entered.pop()
        if not torch.compiler.is_compiling():
            _active.set(before)
        _leave(block)


def _enter(block: list[str]) -> None:
    global _traced
    _blocks.append(block)
    _traced = block[0]


def _leave(block: list[str]) -> None:
    global _traced
    for index, other in enumerate(_blocks):
        if other is block:
            del _blocks[index]
            break
    _traced = _blocks[-1][0] if _blocks else _outside


@contextlib.contextmanager
def record() -> Iterator[dict[str, set[str]]]:
    """Within the block, of this thread or task: which backends serve which op.

    Yields a dictionary that fills as ops are called: op -> names of backends. What runs in a
    graph of torch.compile is not seen.
    """
    log: dict[str, set[str]] = {}
    before = _log.get()
    _log.set(log)
    try:
        yield log
    finally:
        _log.set(before)


def recording() -> bool:
    return _log.get() is not None


def note(op: str, backend: str) -> None:
    """For who calls a backend's function without the registry."""
    log = _log.get()
    if log is not None:
        log.setdefault(op, set()).add(backend)


def recorded(op: str, function: Callable) -> Callable:
    """A bound op's function, which also notes each of its calls."""
    backend = _backends_of[function]

    @functools.wraps(function)
    def call(*args, **kwargs):
        note(op, backend)
        return function(*args, **kwargs)

    _backends_of[call] = backend
    return call


def server(function: Callable) -> str | None:
    """The backend of a function that `implementation`, `resolve` or `recorded` gave; else None."""
    return _backends_of.get(function)


def _not_implemented(op: str, backend: str) -> str:
    return f"this version has no {backend} implementation of {op}"


def _search(op: str, backend: str, device_type: str, dtype: torch.dtype) -> tuple[str, ...]:
    _check_backend(backend, f"environment variable {ENVIRONMENT_VARIABLE}")
    names, reasons = [], []
    for name in AUTO_ORDER if backend == "auto" else (backend,):
        found = IMPLEMENTATIONS[op].get(name)
        if found is not None and backend == "auto" and device_type in found.named_only:
            continue
        reason = _not_implemented(op, name) if found is None else found.why_not(device_type, dtype)
        if reason is None:
            found.load()
            names.append(name)
        else:
            reasons.append(f"backend '{name}' cannot serve {op}: {reason}")
    if not names:
        raise BackendUnavailableError("; ".join(reasons))
    return tuple(names)


def _candidates(op: str, backend: str, device_type: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Backends that can serve, best first, their functions loaded; searched for once."""
    key = (op, backend, device_type, dtype)
    names = _servers.get(key)
    if names is None:
        names = _servers[key] = _search(*key)
    return names


# As torch.compiler.assume_constant_result does, which would import torch._dynamo (seconds).
_candidates._dynamo_marked_constant = True


def implementation(
    op: str, device_type: str, dtype: torch.dtype, width: int = 0, *, backend: str | None = None
) -> Callable:
    """The function for an op: a few look-ups a call, no search.

    That of the backend in force, or of the reference where a transform is active that kernels
    know nothing of (_transforms.py). That of a backend named here, whatever is active.
    """
    if backend is None:
        backend = "reference" if _transforms.active() else _current()
        found = _find(op, device_type, dtype, width, backend)
        if torch.compiler.is_compiling():
            return found.compiled
        note(op, found.backend)
        return found.function
    return _find(op, device_type, dtype, width, backend).function


def _find(
    op: str, device_type: str, dtype: torch.dtype, width: int, backend: str
) -> Implementation:
    for name in _candidates(op, backend, device_type, dtype):
        found = IMPLEMENTATIONS[op][name]
        if (reason := found.why_not_width(width)) is None:
            return found
    raise BackendUnavailableError(f"backend '{backend}' cannot serve {op}: {reason}")


def resolve(
    op: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    width: int = 0,
    backend: str | None = None,
) -> Callable:
    """Bind an op's implementation ahead of time.

    op: a name out of `OPS`. width: the last dimension's size (D of stage_attention, C of the
    adaLN and fused ops), which some backends limit; 0 asks for no particular one. backend: None
    for the active one. Returns a function with the op's signature that neither validates, casts
    nor looks anything up: its arguments must meet the op's contract. Under a transform of
    torch.func or forward-mode AD it is the reference. Raises ValueError for an unknown op or
    backend, BackendUnavailableError where the backend cannot serve it.
    """
    if op not in IMPLEMENTATIONS:
        raise ValueError(f"argument 'op': expected one of {', '.join(OPS)}, got {op!r}")
    if backend is None:
        backend = _current()
    else:
        _check_backend(backend, "argument 'backend'")
    return _find(op, torch.device(device).type, dtype, width, backend).bound


@dataclass(frozen=True)
class Availability:
    """One row of `backends()`."""

    op: str
    backend: str
    available: bool
    limits: str  # what it serves where it is available
    why_not: str


def backends() -> list[Availability]:
    """Every op and backend on this machine: available for some tensor, or why not."""
    rows = []
    for op in OPS:
        for backend in BACKENDS:
            found = IMPLEMENTATIONS[op].get(backend)
            reason = _not_implemented(op, backend) if found is None else found.missing()
            limits = "" if found is None else found.limits()
            rows.append(Availability(op, backend, reason is None, limits, reason or ""))
    return rows

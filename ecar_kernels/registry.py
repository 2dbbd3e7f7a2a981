"""Which backend serves an op: what each can do, why not, and which one is asked for.

The choice is a context variable: threads and asyncio tasks have each their own. torch.compile
cannot read those before 2.14, so it guards on a plain name, that of the block entered last in any
thread, and takes the choice as a constant.
"""

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

from ecar_kernels import _native, _transforms
from ecar_kernels.ops import KERNEL_DTYPES as KERNEL_DTYPES
from ecar_kernels.ops import BoundOp, Family, Implementation, Op

BACKENDS = (
    "reference",
    "cpp",
    "cuda",
    "sdpa",
    "sdpa_flash",
    "sdpa_cudnn",
    "flash_attn",
    "xformers",
    "triton",
)
AUTO_ORDER = ("triton", "cuda", "cpp", "sdpa", "reference")
# Names of an earlier version, which work in this one: the backends that they stood for.
FORMER = {"native": ("cuda", "cpp", "sdpa")}
ENVIRONMENT_VARIABLE = "ECAR_BACKEND"


class BackendUnavailableError(RuntimeError):
    """A backend asked for by name cannot serve the op; the message says why."""


def _families() -> Iterator[Family]:
    """What the folders here declare, each in its record.py."""
    for path in sorted(Path(__file__).parent.glob("*/record.py")):
        yield importlib.import_module(f"ecar_kernels.{path.parent.name}.record").FAMILY


RECORDS: dict[str, Op] = {}
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}
DECLARED = {family.name: family for family in _families()}
FAMILIES = {name: tuple(op.name for op in family.ops) for name, family in DECLARED.items()}
for _family in DECLARED.values():
    for _op in _family.ops:
        RECORDS[_op.name] = _op
        IMPLEMENTATIONS[_op.name] = _op.backends
OPS = tuple(RECORDS)


_outside = os.environ.get(ENVIRONMENT_VARIABLE, "auto")  # in force outside every block
_active: ContextVar[str | None] = ContextVar("ecar_kernels_backend", default=None)
_log: ContextVar[dict[str, set[str]] | None] = ContextVar("ecar_kernels_log", default=None)
_blocks: list[list[str]] = []  # of all threads, those entered and not left yet; one name in each
_traced = _outside  # the last block's, for torch.compile
_servers: dict[tuple, tuple[str, ...]] = {}


def _check_backend(name: str, source: str) -> None:
    if name in FORMER:
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"{source}: {name!r} is now {', '.join(map(repr, FORMER[name]))}, whichever "
                "serves, and will be removed",
                DeprecationWarning,
                stacklevel=3,
            )
    elif name not in (*BACKENDS, "auto"):
        expected = ", ".join(repr(backend) for backend in (*BACKENDS, "auto"))
        raise ValueError(f"{source}: expected one of {expected}, got {name!r}")


def active_backend() -> str:
    """The backend in force: the innermost `use_backend`, else $ECAR_BACKEND, else "auto".

    Raises ValueError for an unknown name in the environment variable: importing never does.
    """
    name = _current()
    if name == _outside:
        _check_backend(name, f"environment variable {ENVIRONMENT_VARIABLE}")
    return name


def _current() -> str:
    if torch.compiler.is_compiling():
        return _traced
    return _active.get() or _outside


class use_backend:
    """Context manager: serve every op from one backend.

    "reference", "cpp" (C++ on the CPU), "cuda" (CUDA C++), "triton" and, for attention, "sdpa"
    (PyTorch's scaled_dot_product_attention), "sdpa_flash", "sdpa_cudnn" (those of its kernels),
    "flash_attn" and "xformers" (the packages) never fall back: an op that the backend cannot serve
    raises `BackendUnavailableError`. "auto" takes the first of triton, cuda, cpp, sdpa and
    reference that can, or what `ecar tune` measured to be faster. The choice holds for the block's
    thread or asyncio task, as torch.no_grad does, and ends with the block; graphs of torch.compile
    follow the block entered last in any thread. The environment variable ECAR_BACKEND sets the
    choice outside every block.
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


def recorded(run: BoundOp) -> BoundOp:
    """A bound op which also notes each of its calls."""

    def noting(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            if not run.chooses:
                note(run.op, run.backend)
            return function(*args, **kwargs)

        return call

    found = BoundOp(run.implementation, noting(run.function), chooses=run.chooses)
    if run.chained is not None:
        found.chained = noting(run.chained)
    return found


def _not_implemented(op: str, backend: str) -> str:
    return f"this version has no {backend} implementation of {op}"


def _search(op: str, backend: str, device_type: str, dtype: torch.dtype) -> tuple[str, ...]:
    if backend == _outside:
        _check_backend(backend, f"environment variable {ENVIRONMENT_VARIABLE}")
    names, reasons = [], []
    for name in AUTO_ORDER if backend == "auto" else FORMER.get(backend, (backend,)):
        found = IMPLEMENTATIONS[op].get(name)
        if found is not None and backend == "auto" and device_type in found.named_only:
            continue
        reason = _not_implemented(op, name) if found is None else found.why_not(device_type, dtype)
        if found is not None and reason is None:
            found.op, found.backend = op, name  # of one that was put in the table, too
            # Imported now, not in a call.
            found.loaded, found.unnamed, found.compiled  # noqa: B018
            names.append(name)
        else:
            reasons.append(f"backend '{name}' cannot serve {op}: {reason}")
    if not names:
        raise BackendUnavailableError("; ".join(reasons))
    return tuple(names)


@_transforms.traced_as_constant
def _candidates(op: str, backend: str, device_type: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Backends that can serve, best first, their functions loaded; searched for once."""
    key = (op, backend, device_type, dtype)
    names = _servers.get(key)
    if names is None:
        names = _servers[key] = _search(*key)
    return names


def implementation(
    op: str, device_type: str, dtype: torch.dtype, width: int = 0, *, backend: str | None = None
) -> BoundOp:
    """The op on the backend that serves: a few look-ups a call, no search.

    The backend in force, or the reference where a transform is active that kernels know nothing of
    (_transforms.py). A backend named here serves whatever is active. Public functions call the
    result's `function`.
    """
    if backend is None:
        backend = "reference" if _transforms.active() else _current()
        found = _find(op, device_type, dtype, width, backend)
        if torch.compiler.is_compiling():
            return found.implementation.compiled
        if not found.chooses:
            note(op, found.backend)
        return found
    return _find(op, device_type, dtype, width, backend)


def _find(op: str, device_type: str, dtype: torch.dtype, width: int, backend: str) -> BoundOp:
    for name in _candidates(op, backend, device_type, dtype):
        found = IMPLEMENTATIONS[op][name]
        if (reason := found.why_not_width(width)) is None:
            return found.unnamed if backend == "auto" else found.loaded
    raise BackendUnavailableError(f"backend '{backend}' cannot serve {op}: {reason}")


def resolve(
    op: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    width: int = 0,
    backend: str | None = None,
) -> BoundOp:
    """Bind an op to a backend ahead of time.

    op: a name out of `OPS`. width: the last dimension's size (D of stage_attention, C of the
    adaLN and fused ops), which some backends limit; 0 asks for no particular one. backend: None
    for the active one. Returns a callable object with the op's signature, a `BoundOp`, which
    neither validates, casts nor looks anything up: its arguments must meet the op's contract.
    Under a transform of torch.func or forward-mode AD it calls the reference. Raises ValueError
    for an unknown op or backend, BackendUnavailableError where the backend cannot serve it.
    """
    if op not in IMPLEMENTATIONS:
        raise ValueError(f"argument 'op': expected one of {', '.join(OPS)}, got {op!r}")
    if backend is None:
        backend = _current()
    else:
        _check_backend(backend, "argument 'backend'")
    found = _find(op, torch.device(device).type, dtype, width, backend)
    key = op, found.backend, found.chooses
    if key not in _resolved or _resolved[key].implementation is not found.implementation:
        _resolved[key] = BoundOp(
            found.implementation, _unless_transformed(found), chooses=found.chooses
        )
    return _resolved[key]


_resolved: dict[tuple[str, str, bool], BoundOp] = {}


def _unless_transformed(found: BoundOp) -> Callable:
    """The function of a bound op, which the registry is not asked for call by call."""
    # Looked up here, not in each call.
    reference, active = IMPLEMENTATIONS[found.op]["reference"].function, _transforms.active
    function, compiled = found.function, found.implementation.compiled.function
    compiling = torch.compiler.is_compiling
    if function is reference:
        return function

    @functools.wraps(function)
    def bound(*args, **kwargs):
        if active():
            return reference(*args, **kwargs)
        return compiled(*args, **kwargs) if compiling() else function(*args, **kwargs)

    return bound


def why_not_bfloat16() -> str | None:
    """None where the backend in force multiplies bfloat16 on the CPU at twice float32's rate (the
    C++ kernels, by AVX512_BF16 or AMX), else why it does not."""
    try:
        served = resolve("adaln_linear", device="cpu", dtype=torch.bfloat16).backend
    except BackendUnavailableError as error:
        return str(error)
    if served != "cpp":
        missing = _native.why_not() if active_backend() == "auto" else None
        return f"products are served by {served}" + ("" if missing is None else f": {missing}")
    if _native.multiplies_bfloat16():
        return None
    return f"the C++ kernels use {_native.instruction_set()} without AVX512_BF16, and widen it"


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

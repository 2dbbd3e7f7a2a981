"""The compiled library: found and loaded on first need, never at import.

ECAR_LIBRARY names another file to load in its place, one with sanitizers for instance.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ecar_kernels import _numbers

FOLDER = Path(__file__).parent
NAMES = ("libecar_cpu.so", "libecar_cpu.dylib")
WHY_NOT_BUILT = "libecar_cpu.why_not.txt"  # left by setup.py where it could not build
CUDA_NAME = "libecar_cuda.so"
WHY_NOT_CUDA = "libecar_cuda.why_not.txt"
ENVIRONMENT_VARIABLE = "ECAR_LIBRARY"


@functools.cache
def why_not() -> str | None:
    """None once the library is loaded, else why it can't be; tried once a process."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    places = [Path(named)] if named else [FOLDER / name for name in NAMES]
    path = next((place for place in places if place.is_file()), None)
    if path is None and named:
        return f"environment variable {ENVIRONMENT_VARIABLE}: no file {named}"
    if path is None:
        note = FOLDER / WHY_NOT_BUILT
        said = note.read_text("utf-8").strip() if note.is_file() else "run pip install ."
        return f"the C++ library is not built: {said}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the C++ library does not load: {error.__cause__ or error}"
    return None


def outdated() -> str | None:
    """Why the last build failed, where the library is that of an earlier one; else None."""
    note = FOLDER / WHY_NOT_BUILT
    if note.is_file() and any((FOLDER / name).is_file() for name in NAMES):
        return note.read_text("utf-8").strip()
    return None


@functools.cache
def why_not_cuda() -> str | None:
    """None once the CUDA half is loaded beside the library, else why it can't be."""
    if (reason := why_not()) is not None:
        return reason
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    return load_cuda()


@functools.cache
def load_cuda() -> str | None:
    """Loads the CUDA half, with or without a GPU; the reason where that fails."""
    if (reason := why_not()) is not None:
        return reason
    path = FOLDER / CUDA_NAME
    if not path.is_file():
        note = FOLDER / WHY_NOT_CUDA
        said = note.read_text("utf-8").strip() if note.is_file() else "run pip install . with nvcc"
        return f"the CUDA C++ library is not built: {said}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the CUDA C++ library does not load: {error.__cause__ or error}"
    return None


def require() -> None:
    """For the modules that bind ops: the library is loaded, or ImportError says why not."""
    if (reason := why_not()) is not None:
        raise ImportError(reason)


def op(name: str) -> Callable:
    """torch.ops.ecar.<name>, of which torch.compile may leave the numbers open (_numbers.py)."""
    return _numbers.twin(getattr(torch.ops.ecar, name).default)


def instruction_set() -> str:
    """What the CPU kernels use on this machine: amx, avx512, avx2 or baseline.

    ECAR_CPU_ISA names a lesser one.
    """
    require()
    return torch.ops.ecar.cpu_instruction_set()


def multiplies_bfloat16() -> bool:
    """Do they multiply bfloat16, at twice the rate of float32 or more? Else it is widened."""
    require()
    return torch.ops.ecar.cpu_multiplies_bfloat16()

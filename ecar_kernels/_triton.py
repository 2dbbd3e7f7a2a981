"""What the Triton backends share: whether they can run here, how their ops are registered.

On CUDA tensors they are compiled; on CPU tensors they run only in Triton's interpreter, where
TRITON_INTERPRET=1 was set before Triton was first imported.
"""

import ctypes
import functools
import importlib.util
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from ecar_kernels import _numbers

OLDEST_CAPABILITY = (8, 0)
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227}  # of a block; else 99
# Programmatic dependent launch: from which chips on, and what switches it off.
DEPENDENT_ARCHITECTURE, DEPENDENT_VARIABLE = 90, "ECAR_DEPENDENT_LAUNCH"
NAMESPACE = "ecar_triton"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def interpreting() -> bool:
    """Does Triton interpret kernels, on the CPU, instead of compiling them?"""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _not_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is None
    except ImportError:  # from a finder that blocks it
        return True


def why_not() -> str | None:
    """None where kernels can run on this machine, else the reason."""
    if _not_installed():
        return "triton is not installed"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU, and TRITON_INTERPRET=1 is not set"
    if torch.version.hip is not None:
        return "its kernels were written and checked for NVIDIA GPUs, this is ROCm"
    return too_old()


def too_old() -> str | None:
    """None where all GPUs are of `OLDEST_CAPABILITY` or newer, else the reason.

    The registry knows "cuda", not which: one that is too old would be sent kernels too.
    """
    found, index = min(
        (torch.cuda.get_device_capability(i), i) for i in range(torch.cuda.device_count())
    )
    if found < OLDEST_CAPABILITY:
        return (
            f"needs GPUs of compute capability {_dotted(OLDEST_CAPABILITY)} or newer, "
            f"cuda:{index} is {_dotted(found)}; CUDA_VISIBLE_DEVICES can leave it out"
        )
    return None


def serves() -> dict[str, Any]:
    """What every Triton implementation says of itself in its op's record."""
    # Interpreted, kernels serve CPU tensors too, but so slowly that none gets them unasked.
    devices = ("cuda", "cpu") if interpreting() else ("cuda",)
    return {"devices": devices, "named_only": devices if interpreting() else (), "missing": why_not}


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@functools.cache
def architecture(device_index: int | None = None) -> int:
    """80, 90, 100, 120 and so on; the interpreter takes the settings of 80."""
    if interpreting():
        return 80
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


@functools.cache
def multiprocessors(device_index: int | None = None) -> int:
    """Streaming multiprocessors of the GPU; the interpreter pretends to a small chip."""
    if interpreting():
        return 4
    return torch.cuda.get_device_properties(device_index).multi_processor_count


@functools.cache
def dependent_launch(device_index: int | None = None) -> dict[str, bool]:
    """Launch options of kernels with an argument DEPENDENT, which may begin before the kernel
    before them on the stream has ended, and wait for it themselves.

    Launched without launch_pdl they do not wait, for then there is nothing to wait for: that is
    all that ECAR_DEPENDENT_LAUNCH=0 changes, read once. Older chips and Tritons cannot.
    """
    from triton.language.extra import cuda

    able = (
        not interpreting()
        and architecture(device_index) >= DEPENDENT_ARCHITECTURE
        and hasattr(cuda, "gdc_wait")  # of Triton 3.5 and newer
    )
    if not able:
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": os.environ.get(DEPENDENT_VARIABLE) != "0"}


def product_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: TF32 only where torch's own setting allows it."""
    # Not `allow_tf32`: reading it raises where the setting was made by its newer name, this one.
    allowed = dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


# A device's zeros, 4 MiB allocated once, and the parts of them that are given away, never back: of
# 256 bytes, or a power of two times that.
_COUNTERS, _LEAST = 1 << 20, 64
_zeros: dict[torch.device, torch.Tensor] = {}
_lent: dict[torch.device, dict[tuple[int, int], torch.Tensor]] = {}
_lending = threading.Lock()


def counters(device: torch.device, count: int) -> torch.Tensor | None:
    """At least `count` zeros, int32, for a kernel that leaves them as zeros when it ends.

    The kernels of a stream run one after the other and share them. A CUDA graph has its own for
    each stream that it was captured on, as it may be replayed while that stream does other work.

    None, and the kernel has to do without, where there are none left, and in a graph that is
    captured before any call outside one.
    """
    key = _stream(device)
    with _lending:
        lent = _lent.setdefault(device, {})
        found = lent.get(key)
        if found is not None and len(found) >= count:
            return found
        if device not in _zeros:
            if key[1]:
                return None
            _zeros[device] = outside_pools(torch.zeros(_COUNTERS, dtype=torch.int32), device)
        size = max(_LEAST, 1 << (count - 1).bit_length())
        left = _zeros[device]
        if size > len(left):
            return None
        lent[key], _zeros[device] = left[:size], left[size:]
        return lent[key]


def outside_pools(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on a device, in memory that no CUDA graph's pool holds, once it has arrived."""
    if device.type != "cuda":
        return tensor
    # On a thread of its own: on this one a memory pool of a CUDA graph to be may be in force
    # (torch.compile's warm-up before it captures).
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(tensor.to, device).result()


def _stream(device: torch.device) -> tuple[int, int]:
    """The current stream, and the number of the capture under way on it, or 0."""
    if device.type != "cuda":
        return 0, 0
    stream = torch.cuda.current_stream(device).cuda_stream
    return stream, capture_number(stream) if torch.cuda.is_current_stream_capturing() else 0


def capture_number(stream: int) -> int:
    """Of the capture under way on a stream: another one for each graph. torch does not tell it."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    error = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    if error:
        raise RuntimeError(f"CUDA error {error}: cuStreamGetCaptureInfo")
    return number.value


def register(schema: str, function: Callable, fake: Callable) -> Callable:
    """Define `schema` ("name(Tensor x, ...) -> Tensor") with a CUDA implementation and a fake.

    Returns the op's only overload, of which torch.compile may leave the numbers open. A plain
    Library op costs a few microseconds a call where torch.library.custom_op costs thirty.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, _on_its_device(function), "CUDA")
    if interpreting():
        _library.impl(name, function, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return _numbers.twin(getattr(getattr(torch.ops, NAMESPACE), name).default)


def _on_its_device(function: Callable) -> Callable:
    """Triton launches on the current device, which need not be the tensors'."""

    @functools.wraps(function)
    def call(first, *rest):
        if first.device.index == torch.cuda.current_device():
            return function(first, *rest)
        with torch.cuda.device(first.device):
            return function(first, *rest)

    return call


@dataclass(frozen=True)
class CompileCase:
    """One kernel under one launch setting, to be compiled without a GPU."""

    name: str  # "adaln_forward bf16 C=1152"
    kernel: Any  # the triton.jit function
    signature: dict[str, str]  # argument -> "*fp32", "i32", "i64", "fp32", or "constexpr"
    constants: dict[str, Any]  # values of the constexpr arguments
    num_warps: int = 4
    num_stages: int = 3
    # Arguments known to be divisible by 16: pointers and what the launcher would specialise.
    aligned: tuple[str, ...] = field(default=())
    max_registers: int | None = None  # of a thread, `maxnreg`; None leaves it to ptxas

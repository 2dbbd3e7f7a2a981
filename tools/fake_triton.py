"""A Triton driver for a GPU that is not there: the real JIT, and launches that are written down.

`Driver(gpu)` goes to `triton.runtime.driver.set_active`. What Triton does before a launch is then
done for the current device's chip: arguments are specialised, kernels compiled to its machine code
(into Triton's cache, as on a machine that has the chip), and held to its limits, which raises
Triton's own OutOfResources. The launch itself is given to the gpu as a `Launch`. Works with Triton
3.6 to 3.9; `tools.fake_gpu.FakeGPU` sets it up and has the tensors.
"""

import contextlib
import functools
import hashlib
import itertools
import math
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as active_driver

from ecar_kernels.costs import CHIPS, Chip, Cost, bytes_of
from ecar_kernels.registry import RECORDS

GRID_LIMITS = (2**31 - 1, 65535, 65535)
MAX_THREADS = 1024
WARP = 32
NOTHING = Cost(0, 0)


H100 = CHIPS["NVIDIA H100 80GB HBM3"]


def chip_of(architecture: int) -> Chip:
    """The chip in CHIPS of that architecture; ValueError where there is none."""
    for chip in CHIPS.values():
        if chip.architecture == architecture:
            return chip
    known = ", ".join(str(chip.architecture) for chip in CHIPS.values())
    raise ValueError(f"argument 'architecture': expected one of {known}, got {architecture}")


@dataclass(frozen=True)
class Launch:
    """A kernel that would have been launched, or a copy between host and device.

    kind: "triton"; "c++" for an op of the CUDA C++ library (one call, whatever it launches);
    "aten" for one of torch's own; "copy" for one between host and device. cost: what it moves and
    multiplies; of an op of several launches, the one with the most programs has all of it. The
    fields behind `cost` are Triton's alone: key names the compiled specialisation, registers and
    stack (bytes a thread) are None where nothing was compiled.
    """

    kind: str
    name: str
    device: int
    stream: int
    captured: bool = False  # into a CUDA graph
    cost: Cost = NOTHING
    grid: tuple[int, int, int] | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    shared: int | None = None
    key: str | None = None
    registers: int | None = None
    stack: int | None = None
    dependent: bool = False  # may begin before the kernel before it has ended

    @property
    def programs(self) -> int | None:
        return None if self.grid is None else math.prod(self.grid)


def cost_of(function: Any, args: Any, kwargs: dict[str, Any], results: Any) -> Cost:
    """An op's bytes, and its multiply-adds by its record or by torch's counter of FLOPs."""
    moved = bytes_of(tree_leaves((args, kwargs, results)))
    name = function._schema.name.partition("::")[2]
    record = RECORDS.get(re.sub("(_velocity|_cached|_chained)+$", "", name))
    if function.namespace != "aten" and record is not None:
        names = [argument.name for argument in function._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        return Cost(moved, record.cost.multiply_adds(record.sizes(given), given))
    flops = flop_registry.get(function.overloadpacket)
    return Cost(moved, flops(*args, **kwargs, out_val=results) // 2 if flops else 0)


class Driver:
    """`triton.runtime.driver.active` of `FakeGPU`'s current device and stream.

    Args:
        gpu: has `chips`, `current_device()`, `current_stream_id(device)`, `launched(**launch)`.
    """

    # The JIT keeps what it compiled by the device's number, for good: each driver has its own.
    _numbers = itertools.count(0, 1000)

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu
        self.first_number = next(self._numbers)
        self.utils = SimpleNamespace(
            load_binary=self._load_binary,
            get_device_properties=self._properties,
            unload_module=lambda module: None,
            set_printf_fifo_size=lambda size: None,
        )
        self.launcher_cls = functools.partial(_Launcher, self)

    @property
    def chip(self) -> Chip:
        return self.gpu.chips[self.gpu.current_device()]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip.architecture, WARP)

    def get_current_device(self) -> int:
        return self.first_number + self.gpu.current_device()

    def set_current_device(self, device: int) -> None:
        torch.cuda.set_device(device - self.first_number)

    def get_current_stream(self, device: int) -> int:
        return self.gpu.current_stream_id(device - self.first_number)

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return self.gpu.chips[device - self.first_number].capability

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self.gpu.current_device())

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, ty: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)

    def _properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.chip.shared_bytes,
            "max_num_regs": self.chip.registers,
            "multiprocessor_count": self.chip.multiprocessors,
            "warpSize": WARP,
        }

    def _load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[object, object, int, int, int]:
        """module, function, registers, spilled bytes, threads that a block may have."""
        registers, stack = resources(cubin)
        # Warps are given registers in lots of 256.
        warps = self.chip.registers // (-(-registers * WARP // 256) * 256)
        binary = SimpleNamespace(registers=registers, stack=stack)
        return binary, binary, registers, stack, min(MAX_THREADS, WARP * warps)


class _Launcher:
    """What a compiled kernel calls, once for each launch."""

    def __init__(self, driver: Driver, src: Any, metadata: Any) -> None:
        self.driver, self.metadata = driver, metadata
        self.name = src.fn.__name__

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: Any,
        kernel_metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *arguments: Any,
    ) -> None:
        for axis, size, limit in zip("xyz", (x, y, z), GRID_LIMITS, strict=True):
            if not 0 <= size <= limit:
                raise RuntimeError(
                    f"Triton Error [CUDA]: invalid argument: {self.name} has "
                    f"{size} programs in {axis}, at most {limit} can be"
                )
        device = self.driver.gpu.current_device()
        for argument in arguments:
            where = getattr(argument, "device", None)
            if where is not None and (where.type, where.index) != ("cuda", device):
                raise RuntimeError(
                    f"{self.name} is launched on cuda:{device}, where a tensor on "
                    f"{where} cannot be read"
                )
        its = self.metadata
        self.driver.gpu.launched(
            kind="triton",
            name=self.name,
            device=device,
            stream=stream,
            grid=(x, y, z),
            num_warps=its.num_warps,
            num_stages=its.num_stages,
            shared=its.shared,
            key=its.hash,
            registers=getattr(function, "registers", None),
            stack=getattr(function, "stack", None),
            dependent=its.launch_pdl,
        )


class _NotCompiled:
    """In a compiled kernel's place where only launches and specialisations are looked at."""

    function = packed_metadata = None

    def __init__(self, driver: Driver, src: Any, options: dict[str, Any]) -> None:
        self.metadata = SimpleNamespace(
            num_warps=options["num_warps"],
            shared=None,
            num_stages=options["num_stages"],
            launch_pdl=options.get("launch_pdl", False),
            hash=_digest(_key(src, options)),
        )
        self.run = driver.launcher_cls(src, self.metadata)

    def launch_metadata(self, *ignored: Any) -> None:
        return None


def _key(src: Any, options: dict[str, Any]) -> str:
    """Names a specialisation: argument types, alignments and constants, and the options."""
    asked = {name: options.get(name) for name in ("num_warps", "num_stages", "maxnreg")}
    return f"{src.fn.__name__} {src.signature} {src.attrs} {src.constants} {asked}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def installed(
    driver: Driver, specialised: list[tuple[str, str]], *, compile_kernels: bool
) -> Iterator[None]:
    """Within the block `driver` is Triton's.

    specialised: gets (kernel's name, key) for each argument combination that is new to the JIT,
    which on a GPU costs a compilation, or at least a look into the cache on disk.
    compile_kernels: False launches them uncompiled, in microseconds and without resources.
    """
    # As the name of an attribute of the package, the function hides the module of that name.
    real, lock = triton.compiler.compile, threading.Lock()

    def compile(src, target=None, options=None, **more):
        with lock:
            specialised.append((src.fn.__name__, _key(src, options)))
        if not compile_kernels:
            return _NotCompiled(driver, src, options)
        return real(src, target=target, options=options, **more)

    before = active_driver._active
    active_driver.set_active(driver)
    try:
        with mock.patch.object(triton.compiler, "compile", compile):
            yield
    finally:
        active_driver._active = before


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as cuobjdump reads them from the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    if usage.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump's output is not understood: {said[:1000]}")
    return usage["REG"], usage["STACK"] + usage["LOCAL"]

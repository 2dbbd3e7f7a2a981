"""A CUDA device that is not there, in this process: for tests, tools and counts without a GPU.

    from tools.fake_gpu import FakeGPU          # before ecar_kernels defines a kernel

    with FakeGPU() as gpu:                      # an H100; FakeGPU(H100, chip_of(120)) has two GPUs
        x = torch.randn(2, 336, 768, device="cuda", dtype=torch.bfloat16)
        y = ecar_kernels.adaln(x, x, x)         # on cuda:0, and served by Triton
    print(gpu.launches)                         # grid, warps, stages, shared memory, key, ...

Within the block torch.cuda reports these GPUs, and torch makes tensors that say they are on them:
plain `torch.Tensor`s and Parameters with `.device` cuda:0, which every part of the product takes
for what they say; `gpu.place(model)` is `model.cuda()`. Ops of the library run to the launch of
each kernel, by Triton's real JIT (tools/fake_triton.py) for that chip; torch's own ops, and those
of the CUDA C++ library, are written down. Nothing is computed: tensors on the GPU have shapes and
no values, and one that is read back (`.cpu()`, `.item()`) is zeros. `FakeGPU(values=True)` keeps
values on the CPU: torch's own ops then compute, and kernels of the library leave zeros.

What would fail on a GPU fails here: tensors on two devices, a launch on another device than the
tensors', too much shared memory or too many threads (Triton's OutOfResources), and under capture
of a CUDA graph what a stream refuses: reading a value back, waiting, copying from memory that is
not pinned.

In a process of its own, without TRITON_INTERPRET, for the product looks at the machine once. It is
in tools/ because tests, benchmarks and tools all use it, and benchmarks may not import tests.
Gradients: `torch.autograd.grad` is replaced by an engine in Python (tools/fake_autograd.py), for
torch's own has one thread for each GPU that there really is. torch.compile is out of scope.
"""

import threading
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ecar_kernels import _native, _triton
from ecar_kernels.costs import Cost, bytes_of
from tools.fake_autograd import gradients
from tools.fake_cuda import Runtime, guard_devices
from tools.fake_triton import H100, NOTHING, Chip, Driver, Launch, chip_of, cost_of, installed

if _triton.interpreting():
    raise ImportError(
        "tools.fake_gpu: expected TRITON_INTERPRET not to be set: kernels that are "
        "interpreted are never launched; start a process without it"
    )

__all__ = ["H100", "Chip", "FakeGPU", "Launch", "chip_of", "gradients"]

CUDA_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
# They make a tensor and launch nothing.
NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
    "record_stream",
}
READS_BACK = {"_local_scalar_dense", "item", "is_nonzero", "equal"}


class _Wrapper(Tensor):
    @classmethod
    def __torch_dispatch__(cls, *ignored: Any) -> Any:
        raise RuntimeError("a tensor of FakeGPU is used outside its block")


class FakeGPU(TorchDispatchMode):
    """See the module.

    Args:
        chips: of cuda:0, cuda:1 and so on; one H100 where none is given.
        compile_kernels: False skips Triton's compiler: grids, counts and specialisations are the
            same, resources are None.
        values: keep values on the CPU, see above.
        native: the CUDA C++ library is there; its ops are written down by name ("c++").

    Attributes:
        log: `Launch`es, and tuples of what was asked of torch.cuda ("wait_event", stream, event),
            in their order.
        specialised: (kernel's name, key) of each combination of arguments that was new to the JIT.
    """

    def __init__(
        self, *chips: Chip, compile_kernels: bool = True, values: bool = False, native: bool = True
    ) -> None:
        super().__init__()
        self.chips, self.native = chips or (H100,), native
        self.host = torch.device("cpu" if values else "meta")
        self.compile_kernels = compile_kernels
        self.log: list[Launch | tuple] = []
        self.specialised: list[tuple[str, str]] = []
        self.runtime, self._driver = Runtime(self), Driver(self)
        self._stack: ExitStack | None = None
        self._depth = 0
        self._made = 0  # bytes of tensors made so far

    @property
    def launches(self) -> list[Launch]:
        return [entry for entry in self.log if isinstance(entry, Launch)]

    def counts(self) -> Counter[str]:
        """Launches by kind."""
        return Counter(launch.kind for launch in self.launches)

    def clear(self) -> None:
        """Forget what was logged; the JIT goes on knowing its specialisations."""
        self.log.clear()
        self.specialised.clear()

    def place(self, module: nn.Module, device: str | torch.device = "cuda") -> nn.Module:
        """The module with its parameters and buffers on the GPU, in place; from any device, meta
        too."""
        where = self._indexed(device)
        for part in module.modules():
            for name, tensor in part._parameters.items():
                if tensor is not None:
                    placed = self._wrap(self._on_host(tensor.detach()), where)
                    placed.__class__ = nn.Parameter
                    part._parameters[name] = placed.requires_grad_(tensor.requires_grad)
            for name, tensor in part._buffers.items():
                if tensor is not None:
                    part._buffers[name] = self._wrap(self._on_host(tensor), where)
        return module

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its import, of seconds, is what keeping torch.compile out costs

    # What the Triton driver asks.

    def current_device(self) -> int:
        return self.runtime.current_device()

    def current_stream_id(self, device: int) -> int:
        return self.runtime.current_stream(device).cuda_stream

    def launched(self, **launch: Any) -> None:
        self.log.append(Launch(captured=self.runtime.capturing(), **launch))

    # The mode.

    def __enter__(self) -> "FakeGPU":
        if self._depth == 0:
            self._stack = ExitStack()
            guard_devices()
            for known in (_triton.architecture, _triton.multiprocessors, _triton.dependent_launch):
                known.cache_clear()
                self._stack.callback(known.cache_clear)
            for kept in (_triton._zeros, _triton._lent):
                self._stack.enter_context(mock.patch.dict(kept, clear=True))
            self._stack.enter_context(self.runtime.patched())
            self._stack.enter_context(
                installed(self._driver, self.specialised, compile_kernels=self.compile_kernels)
            )
            # torch.tensor(..) makes its tensor on the CPU, which no mode sees, and then moves it.
            self._stack.callback(
                torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors()
            )
            torch._C._set_only_lift_cpu_tensors(True)
            for owner, name, value in self._patches():
                self._stack.enter_context(mock.patch.object(owner, name, value))
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            self._stack.close()

    def _patches(self) -> list[tuple[Any, str, Any]]:
        run, tensor = threading.Thread.run, torch.tensor

        def on_device(*data: Any, device: Any = None, **how: Any) -> Tensor:
            # The guard below knows no current device, which "cuda" alone means.
            return tensor(*data, device=None if device is None else self._indexed(device), **how)

        def with_gpu(thread: threading.Thread) -> None:
            with self:  # a mode holds for one thread
                run(thread)

        found = [
            (_triton, "capture_number", self.runtime.capture_number),
            (torch.autograd, "grad", gradients),
            (threading.Thread, "run", with_gpu),
            (torch, "tensor", on_device),
        ]
        if self.native:
            found += [
                (_native, "load_cuda", _native.why_not),
                (torch.version, "cuda", torch.version.cuda or "13.0"),
            ]
        return found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in inputs if _inner(tensor) is not None]
        asked = kwargs.get("device")
        name = function._schema.name.partition("::")[2]
        if name in ("pin_memory", "_pin_memory", "is_pinned"):
            return self._pinned(name, inputs[0])
        if not ours and (asked is None or torch.device(asked).type != "cuda"):
            return function(*args, **kwargs)
        where = self._indexed(asked) if asked is not None else ours[0].device
        for tensor in ours if name not in ("copy_", "_to_copy") and asked is None else ():
            if tensor.device != where:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at "
                    f"least two devices, {where} and {tensor.device}! ({function})"
                )
        if function.namespace == "ecar_triton":
            return self._run_triton(function, args, kwargs)
        with self:  # within an op of the library even `to` comes whole
            if (made := function.decompose(*args, **kwargs)) is not NotImplemented:
                return made
        device = (where if where.type == "cuda" else ours[0].device).index
        if self.runtime.capturing():
            self._refuse(name, inputs, ours, where, args, kwargs)
        crossed = name in ("copy_", "_to_copy") and (
            len(ours) < len(inputs) or where.type != "cuda" or not ours
        )
        if name in READS_BACK:
            self._note("copy", name, device)
            value = _inner(ours[0])
            if value.is_meta:
                return False if name in ("equal", "is_nonzero") else _zero(value.dtype)
            return function(*tree_map(self._host_of, args))
        if where.type != "cuda":
            self._note("copy", name, device)
            return self._to_host(ours[0], kwargs)
        results = self._run(function, args, kwargs, where)
        size = sum(leaf.numel() for leaf in tree_leaves(results) if isinstance(leaf, Tensor))
        if crossed:
            self._note("copy", name, device)
        elif function.namespace == "ecar":
            self._note("c++", name, device, cost_of(function, args, kwargs, results))
        elif name in NO_KERNEL:
            self._made += bytes_of(tree_leaves(results))
        elif size and not _is_view(function):
            self._note("aten", name, device, cost_of(function, args, kwargs, results))
        return results

    def _run_triton(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Its widest launch has the op's cost: of what it makes for itself, too, which is written
        and read."""
        first, before = len(self.log), self._made
        with self:
            results = function.redispatch(CUDA_KEY, *args, **kwargs)
        cost = cost_of(function, args, kwargs, results)
        own = max(0, self._made - before - bytes_of(tree_leaves(results)))
        where = [at for at in range(first, len(self.log)) if isinstance(self.log[at], Launch)]
        if where:
            widest = max(where, key=lambda at: self.log[at].programs or 0)
            self.log[widest] = replace(self.log[widest], cost=cost + Cost(2 * own, 0))
        return results

    def _pinned(self, name: str, tensor: Tensor) -> bool | Tensor:
        if name == "is_pinned":
            return getattr(tensor, "pinned", False)
        copy = tensor.clone()
        copy.pinned = True
        return copy

    def _note(self, kind: str, name: str, device: int, cost: Cost = NOTHING) -> None:
        stream = self.current_stream_id(device)
        self.launched(kind=kind, name=name, device=device, stream=stream, cost=cost)

    def _run(self, function: Any, args: Any, kwargs: dict[str, Any], where: torch.device) -> Any:
        """On the host's tensors; results are on the GPU, views of what they were views of."""
        known = {
            id(_inner(leaf)): leaf
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and _inner(leaf) is not None
        }
        if "device" in kwargs:
            kwargs["device"] = self.host
        kwargs.pop("pin_memory", None)
        if function.namespace == "ecar":  # its CPU kernels are not what would run
            args, kwargs = tree_map(_as_meta, (args, kwargs))
            results = function(*args, **kwargs)
            return tree_map_only(
                Tensor, lambda made: self._wrap(self._on_host(made), where), results
            )
        args, kwargs = tree_map(self._host_of, (args, kwargs))
        results = function(*args, **kwargs)
        if self.host.type == "cpu" and function._schema.name in (
            "aten::empty",
            "aten::new_empty",
            "aten::empty_like",
        ):
            results.zero_()  # what no kernel writes is the same each time
        return tree_map_only(
            Tensor,
            lambda made: known[id(made)] if id(made) in known else self._wrap(made, where),
            results,
        )

    def _refuse(
        self,
        name: str,
        inputs: list[Tensor],
        ours: list[Tensor],
        where: torch.device,
        args: Any,
        kwargs: dict[str, Any],
    ) -> None:
        """What a stream under capture does not take."""
        bad = name in READS_BACK or where.type != "cuda"
        if name in ("copy_", "_to_copy") and len(ours) < len(inputs):
            asynchronous = kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
            bad |= not (
                asynchronous
                and all(
                    getattr(tensor, "pinned", False) for tensor in inputs if _inner(tensor) is None
                )
            )
        if bad:
            self.runtime.break_capture()
            raise RuntimeError(
                f"CUDA error: operation not permitted when stream is capturing: {name}"
            )

    def _indexed(self, device: Any) -> torch.device:
        device = torch.device(device)
        if device.type != "cuda":
            return device
        return torch.device("cuda", self.runtime.index(device))

    def _host_of(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        inner = _inner(value)
        if inner is None and value.dim():
            return self._on_host(value)
        return value if inner is None else inner

    def _on_host(self, tensor: Tensor) -> Tensor:
        inner = _inner(tensor)
        if inner is not None:
            return inner
        if tensor.device == self.host:
            return tensor
        if tensor.is_meta:
            return torch.zeros_like(tensor, device=self.host)
        return tensor.to(self.host)

    def _to_host(self, tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
        inner, dtype = _inner(tensor), kwargs.get("dtype") or tensor.dtype
        if not inner.is_meta:
            return inner.to(dtype, copy=True)
        return torch.zeros(inner.shape, dtype=dtype)

    def _wrap(self, inner: Tensor, device: torch.device) -> Tensor:
        tensor = Tensor._make_wrapper_subclass(
            _Wrapper,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        tensor.__class__ = Tensor  # the mode serves it: nothing can tell it from a plain one
        tensor.on_host = inner
        return tensor


def _inner(tensor: Tensor) -> Tensor | None:
    return tensor.__dict__.get("on_host")


def _as_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    inner = _inner(value)
    return (value if inner is None else inner).to("meta")


def _zero(dtype: torch.dtype) -> Any:
    return torch.zeros((), dtype=dtype).item()


def _is_view(function: Any) -> bool:
    returns = function._schema.returns
    return bool(returns) and all(
        found.alias_info is not None and not found.alias_info.is_write for found in returns
    )

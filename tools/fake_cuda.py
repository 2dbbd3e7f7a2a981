"""torch.cuda for `tools.fake_gpu`: devices, streams, events and graphs that write down their calls.

torch's own context managers (`torch.cuda.device`, `stream`, `graph`) stay in force; what they call
is replaced. The current device and stream are the thread's, as in CUDA.
"""

import contextlib
import ctypes
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch


class Runtime:
    """State of the fake CUDA; `gpu` has chips and log."""

    def __init__(self, gpu: Any) -> None:
        self.gpu, self._local = gpu, threading.local()
        self._numbers = itertools.count(1)
        self._defaults = [Stream(self, index, 0) for index in range(len(gpu.chips))]
        self._captures: dict[Stream, Graph] = {}

    def note(self, *call: Any) -> None:
        self.gpu.log.append(call)

    # Devices.

    def current_device(self) -> int:
        return getattr(self._local, "device", 0)

    def set_device(self, device: Any) -> None:
        index = self.index(device)
        if index >= 0:
            self._local.device = index

    def exchange_device(self, index: int) -> int:
        before = self.current_device()
        self.set_device(index)
        return before

    def index(self, device: Any) -> int:
        """Of None, a number, "cuda:1" or a torch.device; -1 leaves the device alone."""
        if device is None:
            return self.current_device()
        if not isinstance(device, int):
            device = torch.device(device).index
            device = self.current_device() if device is None else device
        if device >= len(self.gpu.chips):
            raise RuntimeError(
                f"CUDA error: invalid device ordinal: {device} of {len(self.gpu.chips)}"
            )
        return device

    def capability(self, device: Any = None) -> tuple[int, int]:
        return self.gpu.chips[self.index(device)].capability

    def properties(self, device: Any = None) -> SimpleNamespace:
        chip = self.gpu.chips[self.index(device)]
        major, minor = chip.capability
        return SimpleNamespace(
            name=chip.name,
            major=major,
            minor=minor,
            total_memory=80 << 30,
            multi_processor_count=chip.multiprocessors,
            warp_size=32,
            L2_cache_size=50 << 20,
            shared_memory_per_block_optin=chip.shared_bytes,
        )

    # Streams and captures.

    def current_stream(self, device: Any = None) -> "Stream":
        index = self.index(device)
        return self._streams().get(index, self._defaults[index])

    def set_stream(self, stream: "Stream | None") -> None:
        if stream is None:
            return
        self._streams()[stream.device.index] = stream
        self.set_device(stream.device)

    def _streams(self) -> dict[int, "Stream"]:
        return self._local.__dict__.setdefault("streams", {})

    def new_stream(self, device: Any = None, priority: int = 0, **ignored: Any) -> "Stream":
        return Stream(self, self.index(device), next(self._numbers))

    def capturing(self) -> bool:
        return self.current_stream() in self._captures

    def capture_number(self, stream: int) -> int:
        return next(id(its) for key, its in self._captures.items() if key.cuda_stream == stream)

    def break_capture(self) -> None:
        self._captures[self.current_stream()].broken = True

    def begin(self, graph: "Graph", stream: "Stream") -> None:
        self._captures[stream] = graph

    def end(self, graph: "Graph") -> None:
        for stream in [stream for stream, its in self._captures.items() if its is graph]:
            del self._captures[stream]

    def synchronize(self, device: Any = None) -> None:
        self._no_capture("synchronize")
        self.note("synchronize", self.index(device))

    def empty_cache(self) -> None:
        self.note("empty_cache")

    def _no_capture(self, what: str) -> None:
        if self.capturing():
            self.break_capture()
            raise RuntimeError(
                f"CUDA error: operation not permitted when stream is capturing: {what}"
            )

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """torch.cuda is this one within the block."""
        pools = itertools.count(1)
        replaced = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "init": lambda: None,
            "device_count": lambda: len(self.gpu.chips),
            "current_device": self.current_device,
            "set_device": self.set_device,
            "_exchange_device": self.exchange_device,
            "_maybe_exchange_device": self.exchange_device,
            "get_device_capability": self.capability,
            "get_device_properties": self.properties,
            "get_device_name": lambda device=None: self.properties(device).name,
            "current_stream": self.current_stream,
            "default_stream": self._default_stream,
            "set_stream": self.set_stream,
            "Stream": self.new_stream,
            "Event": lambda *args, **kwargs: Event(self),
            "CUDAGraph": lambda *args: Graph(self),
            "graph_pool_handle": lambda: (0, next(pools)),
            "is_current_stream_capturing": self.capturing,
            "synchronize": self.synchronize,
            "empty_cache": self.empty_cache,
        }
        internal = {
            "_host_emptyCache": lambda: None,
            "_cuda_endAllocateToPool": lambda index, pool: self.note("end_pool", index, pool),
        }
        with contextlib.ExitStack() as stack:
            for owner, names in ((torch.cuda, replaced), (torch._C, internal)):
                for name, value in names.items():
                    stack.enter_context(mock.patch.object(owner, name, value, create=True))
            yield

    def _default_stream(self, device: Any = None) -> "Stream":
        return self._defaults[self.index(device)]


class Stream:
    def __init__(self, runtime: Runtime, index: int, number: int) -> None:
        self.runtime, self.cuda_stream = runtime, number
        self.device, self.device_index = torch.device("cuda", index), index

    def __repr__(self) -> str:
        return f"Stream({self.device}, {self.cuda_stream})"

    def wait_stream(self, other: "Stream") -> None:
        self.runtime.note("wait_stream", self, other)

    def wait_event(self, event: "Event") -> None:
        self.runtime.note("wait_event", self, event)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = Event(self.runtime) if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.runtime._no_capture("synchronize")
        self.runtime.note("synchronize_stream", self)


class Event:
    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def record(self, stream: Stream | None = None) -> None:
        self.runtime.note(
            "record", self, self.runtime.current_stream() if stream is None else stream
        )

    def wait(self, stream: Stream | None = None) -> None:
        self.runtime.note(
            "wait_event", self.runtime.current_stream() if stream is None else stream, self
        )

    def synchronize(self) -> None:
        self.runtime._no_capture("synchronize")
        self.runtime.note("synchronize_event", self)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds: one for each launch of the graphs replayed in between."""
        log = self.runtime.gpu.log
        marks = {
            entry[1]: place
            for place, entry in enumerate(log)
            if isinstance(entry, tuple) and entry[0] == "record"
        }
        return float(
            sum(
                len(entry[1].launches)
                for entry in log[marks[self] : marks[end]]
                if isinstance(entry, tuple) and entry[0] == "replay"
            )
        )


class Graph:
    """A CUDAGraph. `broken`: something that no stream captures was called within."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.broken, self.begun = runtime, False, 0
        self.launches: list[Any] = []

    def capture_begin(
        self, pool: Any = None, capture_error_mode: str = "global", **ignored: Any
    ) -> None:
        stream = self.runtime.current_stream()
        if stream.cuda_stream == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.runtime.note("capture_begin", self, stream, pool, capture_error_mode)
        self.begun = len(self.runtime.gpu.log)
        self.runtime.begin(self, stream)

    def capture_end(self) -> None:
        self.runtime.end(self)
        self.runtime.note("capture_end", self)
        if self.broken:
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )
        self.launches = [
            entry
            for entry in self.runtime.gpu.log[self.begun :]
            if not isinstance(entry, tuple) and entry.captured
        ]

    def replay(self) -> None:
        self.runtime.note("replay", self, self.runtime.current_stream())

    def reset(self) -> None:
        self.runtime.note("reset", self)

    def pool(self) -> Any:
        return None


def guard_devices() -> None:
    """torch's C++ asks a guard for the current device and stream of every device type it meets.

    A torch with CUDA and no GPU has a function that puts one that does nothing in CUDA's place. A
    CPU build has none at all: there it is the meta device's, which does nothing either.
    """
    torch._C._ensureCUDADeviceGuardSet()
    if torch.backends.cuda.is_built():
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    cuda, meta = 1, 14  # c10::DeviceType
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE"
    )
    guards[cuda] = guards[meta]

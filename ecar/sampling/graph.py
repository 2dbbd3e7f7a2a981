"""The engine that replays a CUDA graph of a whole image, and the graphs that a model keeps.

A graph is the plain engine's run, captured once and then replayed for other images. It belongs to
one model and one key (batch, steps of each stage, solver, guided steps, backend, number format). It
reads the weights where they lie: new values copied into them are seen by the next replay, other
storage (``.to()``, a swapped module) drops the model's graphs. Classes, seeds, guidance scales and
where the steps lie are data in the buffers of its ``Inputs``.

All graphs of a model share one memory pool, of the size of the largest, and are replayed one at
a time: between replays nothing in the pool is alive.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ecar.flow import FlowHead
from ecar.model import ECAR
from ecar.sampling import loop
from ecar.sampling.plain import PlainEngine
from ecar.sampling.solver import Grid
from ecar.sampling.stage import Inputs, Shape
from ecar.transformer import ARTransformer
from ecar_kernels import MLP, FlowBlock, Linear, StageBlock, active_backend
from ecar_kernels.inspection import address, in_transform, why_not_as_written

__all__ = ["CaptureError", "GraphCache", "GraphEngine", "graphs_of", "release_graphs"]

# Modules whose code does the same each time.
CAPTURED = {
    ECAR,
    ARTransformer,
    FlowHead,
    StageBlock,
    FlowBlock,
    MLP,
    Linear,
    nn.Linear,
    nn.LayerNorm,
    nn.Embedding,
    nn.SiLU,
    nn.Sequential,
    nn.ModuleList,
}
LIMIT = 8  # graphs kept for a model
OUT_OF_MEMORY = "the device has too little memory to capture it"

_log = logging.getLogger(__name__)


class CaptureError(RuntimeError):
    """A graph could not be captured; the message says why. Sampling without one goes on."""


class CudaRecorder:
    """The part that only a GPU can do: capture on a stream of its own, and order the replays."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.done = torch.cuda.Event()

    def warm_up(self, run: Callable[[], None]) -> None:
        """One plain run: kernels are compiled, tables and workspaces made, outside the pool."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            run()
        current.wait_stream(self.stream)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture ``run``, without executing it; the function returned replays it."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # Other threads may allocate meanwhile: only this one's calls can spoil the capture.
            with (
                _no_collection(),
                torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ),
            ):
                run()
        except BaseException:
            # A capture that ends in an error leaves its stream the current one and, before torch
            # 2.12, its pool recording, on which the next empty_cache would fail (pytorch #180395).
            torch.cuda.set_stream(before)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            raise
        return graph.replay

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Between uses of the buffers on two streams, the later waits for the earlier."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.done)
            yield
            self.done.record(stream)

    def settle(self) -> None:
        """Before memory goes: no replay may be under way."""
        torch.cuda.synchronize(self.device)

    def give_back(self) -> None:
        """Unused memory goes back to the device."""
        torch.cuda.empty_cache()


_collecting = threading.Lock()  # gc's state is the process's, so one capture at a time


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected within the block: an event or a graph among it would be destroyed,
    which a capture under way does not survive."""
    with _collecting:
        enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def device_reason(device: torch.device) -> str | None:
    """Why there are no graphs on this device, or None."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, the model is on {device}"
    if torch.cuda.is_current_stream_capturing():
        return "the current stream is being captured by the caller"
    if torch.is_autocast_enabled("cuda"):
        return "under torch.autocast the weights' casts live no longer than the call"
    if in_transform():
        return "a transform of torch.func or forward-mode AD is active"
    return None


def weights_of(model: nn.Module) -> tuple:
    """What a graph of the model has baked in: where each weight lies, and what code runs.

    Raises:
        CaptureError: a module is another than E-CAR's, or is not as its class is written. Its
            Python code may do something else each time, which a replay would not.
    """
    found: list[Any] = []
    stack: list[nn.Module] = [model]
    while stack:
        module = stack.pop()
        own = module.__dict__
        binding = own.get("_binding")  # `accelerate` changes the class, and binds it to a backend
        kind = type(module) if binding is None else binding.original
        reason = (
            why_not_as_written(module, kind, compiled=True)
            if kind in CAPTURED
            else f"a CUDA graph would not run its code, which is none of E-CAR's ({kind})"
        )
        if reason is not None:
            raise CaptureError(f"{kind.__name__}: {reason}")
        found += (type(module), binding, id(own.get("_compiled_call_impl")))
        for tensors in (module._parameters, module._buffers):
            found += [address(tensor) for tensor in tensors.values() if tensor is not None]
        stack += [inner for inner in module._modules.values() if inner is not None]
    return tuple(found)


class GraphEngine:
    """An ``Engine`` (loop.py) whose first step is the whole image.

    Args:
        inputs: what the graph reads; to be loaded before each run.
        ends: outside the pool, where a replay leaves the end state of every stage.
        served: what served the ops that were captured; see ``SampleOutput.served``.
        replay: starts the graph on the current stream.
    """

    def __init__(
        self, inputs: Inputs, ends: list[Tensor], served: dict[str, str], replay: Callable[[], None]
    ) -> None:
        self.inputs, self.served = inputs, served
        self._ends, self._replay = ends, replay
        self._stage = 0

    def begin(self, stage: int) -> None:
        self._stage = stage

    def step(self, step: int) -> int:
        if self._stage == 1:
            self._replay()
        return self.inputs.shape.counts[self._stage - 1] - step

    def image(self) -> Tensor:
        return self._ends[self._stage - 1].clone()

    def replace(self, x: Tensor, step: int) -> None:
        raise RuntimeError("the image that a CUDA graph draws is done: no state can be replaced")

    def finish(self) -> Tensor:
        return self.image()  # a copy, as the next replay writes over it


class GraphCache:
    """The graphs of one model, the least recently used dropped first.

    Args:
        limit: graphs kept.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._recorder: CudaRecorder | None = None
        self._graphs: OrderedDict[tuple, GraphEngine] = OrderedDict()
        self._weights: tuple = ()
        self._lock = threading.RLock()
        self.refused: dict[tuple, str] = {}  # keys whose capture failed, and why

    def __len__(self) -> int:
        return len(self._graphs)

    def draw(
        self,
        model: ECAR,
        shape: Shape,
        labels: Tensor,
        seeds: Tensor,
        scales: Sequence[Sequence[float]],
        grid: Grid,
        progress: Callable[[int], object] | None = None,
    ) -> tuple[list[Tensor], dict[str, str]]:
        """The end state of every stage, replayed, and what serves it (``SampleOutput.served``).

        It is captured first where the key is new. progress: as ``loop.run``'s.

        Raises:
            CaptureError: the graph can't be had, now or at an earlier try with this key.
            torch.OutOfMemoryError: there is no memory for the run itself.
        """
        with self._lock:
            self._check_weights(model)
            key = (shape, model.device, model.dtype, active_backend(), number_format())
            if key in self.refused:
                raise CaptureError(self.refused[key])
            if key not in self._graphs:
                self._capture(model, shape, key, (labels, seeds, scales, grid))
            self._graphs.move_to_end(key)
            engine = self._graphs[key]
            assert self._recorder is not None, "a graph without the recorder that captured it"
            with self._recorder.turn():
                engine.inputs.load(labels, seeds, scales, grid)
                return loop.run(engine, shape.counts, progress=progress), engine.served

    def release(self) -> None:
        """Drop all graphs, and forget what failed; their memory goes back to the device."""
        with self._lock:
            self.refused.clear()
            self._drop()

    def _drop(self) -> None:
        if self._recorder is None:
            return
        self._recorder.settle()
        self._graphs.clear()
        # A capture that broke off may have left its stream and pool unusable: a new one next.
        recorder, self._recorder = self._recorder, None
        recorder.give_back()

    def _check_weights(self, model: ECAR) -> None:
        weights = weights_of(model)
        if weights != self._weights:
            self.release()
            self._weights = weights

    def _capture(self, model: ECAR, shape: Shape, key: tuple, data: tuple) -> None:
        while self._recorder is not None and len(self._graphs) >= self.limit:
            self._recorder.settle()
            self._graphs.popitem(last=False)
        found = self._attempt(model, shape, data)
        if found is OUT_OF_MEMORY:
            # Graphs of other shapes hold memory: without them there may be enough.
            self._drop()
            found = self._attempt(model, shape, data)
        if isinstance(found, GraphEngine):
            self._graphs[key] = found
            return
        self._drop()
        if found is not OUT_OF_MEMORY:  # there may be memory another time
            self.refused[key] = found
        _log.warning("sampling goes on without a CUDA graph: %s", found)
        raise CaptureError(found)

    def _attempt(self, model: ECAR, shape: Shape, data: tuple) -> GraphEngine | str:
        """The graph, or why not.

        Words, not the exception: its traceback would keep the tensors of the attempt alive.
        """
        try:
            return self._record(model, shape, data)
        except torch.OutOfMemoryError:
            return OUT_OF_MEMORY
        except CaptureError as error:
            cause: BaseException = error.__cause__ or error
            while cause.__context__ is not None:  # what ended the capture hides what broke it
                cause = cause.__context__
            if isinstance(cause, torch.OutOfMemoryError):
                return OUT_OF_MEMORY
            said = str(cause).strip().splitlines() or [type(cause).__name__]
            return f"{error}: {said[0]}"

    def _record(self, model: ECAR, shape: Shape, data: tuple) -> GraphEngine:
        if self._recorder is None:
            self._recorder = CudaRecorder(model.device)
        recorder = self._recorder
        with recorder.turn():
            inputs = Inputs(model, shape, device_data=True)
            inputs.load(*data)
            ends = [
                torch.empty(shape.batch, *model.config.stage_shape(stage), device=model.device)
                for stage in range(1, model.config.num_stages + 1)
            ]

            def run() -> None:
                engine = PlainEngine(model, inputs)
                for kept, end in zip(ends, loop.run(engine, shape.counts), strict=True):
                    kept.copy_(end)

            with loop.served_by() as served:
                recorder.warm_up(run)
            try:
                replay = recorder.record(run)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise CaptureError("the capture failed") from error
        return GraphEngine(inputs, ends, served, replay)


def number_format() -> tuple[str, str]:
    """How float32 products are computed now: "ieee" or "tf32", and torch's setting for all."""
    # torch.backends is a module whose class has this property.
    both: str = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return torch.backends.cuda.matmul.fp32_precision, both


_caches: weakref.WeakKeyDictionary[ECAR, GraphCache] = weakref.WeakKeyDictionary()


def graphs_of(model: ECAR) -> GraphCache:
    """The model's graphs; empty until it was sampled with graphs."""
    return _caches.setdefault(model, GraphCache())


def release_graphs(model: ECAR) -> None:
    """Drop the model's CUDA graphs and free their memory; the next ``sample`` captures anew."""
    if model in _caches:
        _caches[model].release()

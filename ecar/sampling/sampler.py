"""``sample``: what a caller asks for, checked, and the engine that draws it (design.md, 3.4).

The loop over stages and steps is in loop.py.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecar.model import ECAR, check_labels
from ecar.sampling import graph, loop
from ecar.sampling.cpu import CpuEngine
from ecar.sampling.graph import CaptureError, release_graphs
from ecar.sampling.guidance import DEFAULT_STEPS, Guidance, Steps, plan_steps
from ecar.sampling.loop import StepInfo
from ecar.sampling.plain import PlainEngine
from ecar.sampling.solver import Grid, solver_class
from ecar.sampling.stage import Inputs, Shape
from ecar_kernels import active_backend, inspection

__all__ = ["SampleOutput", "run_eagerly", "sample", "why_not_graphs"]

_log = logging.getLogger(__name__)
_BAR = {"desc": "sampling", "unit": "step"}
_said: set[str | tuple[str, str]] = set()  # reasons, each told once a process


@dataclass(frozen=True)
class SampleOutput:
    """What ``sample`` returns.

    Attributes:
        latents: [B, C, H, W], float32.
        stage_ends: with ``return_stage_ends``, the end state of every stage, coarse to fine.
        why_not_graph: None where a CUDA graph was replayed, else the reason.
        served: for each op of ``ecar_kernels`` that drew them, the backend that served it, or
            several, as in "cpp, reference". A model's class is there too, with "torch" where
            its layers are torch's own (as without ``accelerate``), or with "unknown" where it
            stands in for one of ours.
    """

    latents: Tensor
    stage_ends: list[Tensor] | None
    why_not_graph: str | None = None
    served: dict[str, str] = field(default_factory=dict)


def sample(
    model: ECAR,
    class_labels: Tensor,
    *,
    seeds: Tensor,
    steps: Steps = DEFAULT_STEPS,
    solver: str | None = None,
    grid: float | Sequence[Sequence[float]] | None = None,
    guidance_scale: float = 1.0,
    guidance_schedule: str = "constant",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    callback: Callable[[StepInfo], Tensor | None] | None = None,
    progress: bool | dict[str, Any] = False,
    return_stage_ends: bool = False,
    graphs: bool | str = "auto",
    tf32: bool | None = None,
) -> SampleOutput:
    """Draw one latent for each class and seed.

    An image depends on its class, its seed and the settings alone, not on its place in the
    batch, on the batch's size or on the device (to rounding).

    On a CUDA device the first call of a kind captures a CUDA graph of the whole image, and all
    calls of that kind replay it. A kind is a batch size, each stage's steps, a solver, which steps
    are guided, a backend, and the format of numbers; classes, seeds, guidance scales and where the
    steps lie are free. The model's 8 last used graphs are kept, with memory for the largest;
    ``release_graphs`` frees it.

    Args:
        model: on any device; its weights' dtype is that of the network calls, the state itself
            is float32. bfloat16 is ``model.to(torch.bfloat16)``.
        class_labels: int64 [B] in [0, num_classes).
        seeds: int64 [B].
        steps: of all stages together, split by ``split_steps``; or of each stage in a list; or
            "paper", the paper's protocol: 250 even Euler steps, split evenly. A step is one
            network call, or two of Heun's.
        solver: "euler" (order 1), "heun" (order 2) or "ab2" (order 2 at one network call a step:
            Adams-Bashforth, which remembers the velocity before). None is "ab2", or "euler" with
            "paper".
        grid: where a stage's N steps begin: the exponent p of (i / N)^p, where 1 is even and more
            puts the steps closer together at a stage's beginning; or a list of each stage's times
            in [0, 1), as many as it has steps, from 0 on. None is 1.6, or 1 with "paper".
        guidance_scale, guidance_schedule, guidance_interval: see ``Guidance``.
        callback: called after each step; a returned tensor replaces the state. There is no graph
            then.
        progress: show a progress bar, or options of tqdm for it; a graph's steps come all at once.
        return_stage_ends: keep the end state of every stage.
        graphs: "auto" uses a CUDA graph where one can be had, and says in
            ``SampleOutput.why_not_graph`` why not; True raises instead; False never does.
        tf32: matrix products of a float32 model on CUDA in TF32 (10 bits of mantissa) or not;
            None is torch's own setting, which is not.

    Warns:
        RuntimeWarning: on a CUDA device, once for each reason why its kernels are missing.

    Raises:
        TypeError, ValueError: naming the argument; also for "paper" with another solver or grid.
        RuntimeError: ``graphs=True`` and there can be none.
        torch.OutOfMemoryError: the device has too little memory for the batch.
    """
    config, batch = model.config, len(class_labels)
    check_labels(class_labels, config.num_classes)
    _check_seeds(seeds, batch)
    counts, solver, placed = plan_steps(steps, solver, grid, config.num_stages)
    if graphs not in (True, False, "auto"):
        raise ValueError(f"argument 'graphs': expected True, False or 'auto', got {graphs!r}")
    if tf32 not in (None, True, False):
        raise ValueError(f"argument 'tf32': expected True, False or None, got {tf32!r}")
    scales = Guidance(guidance_scale, guidance_schedule, guidance_interval).scales(counts, placed)
    guided = tuple(tuple(scale != 1.0 for scale in values) for values in scales)
    shape = Shape(batch, tuple(counts), solver, guided)
    data = (class_labels, seeds, scales, placed)
    options = progress if isinstance(progress, dict) else {"disable": not progress}
    _warn_of_missing_kernels(model.device)

    # Buffers that outlive the call must be normal tensors, also where the caller is in
    # inference mode.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        _tf32(tf32),
        tqdm(total=sum(counts), **(_BAR | options)) as bar,
    ):
        drawn, reason = None, _why_not(model, callback, graphs)
        if reason is None:
            done = None if bar.disable else _after_synchronizing(model.device, bar.update)
            try:
                drawn = graph.graphs_of(model).draw(model, shape, *data, progress=done)
            except CaptureError as error:
                reason = str(error)
        if drawn is None:
            if graphs is True:
                raise RuntimeError(f"argument 'graphs': expected 'auto' or False: {reason}")
            if graphs and reason is not None and reason not in _said:
                _said.add(reason)
                _log.info("sampling without CUDA graphs: %s", reason)
            drawn = run_eagerly(model, shape, *data, progress=bar.update, callback=callback)
    ends, served = drawn
    return SampleOutput(ends[-1], ends if return_stage_ends else None, reason, dict(served))


def _after_synchronizing(
    device: torch.device, update: Callable[[int], object]
) -> Callable[[int], None]:
    def done(steps: int) -> None:
        torch.cuda.synchronize(device)
        update(steps)

    return done


def why_not_graphs(
    model: ECAR, *, callback: Callable[[StepInfo], Tensor | None] | None = None
) -> str | None:
    """Why ``sample`` would not try a CUDA graph here, or None. A capture itself may still fail:
    ``SampleOutput.why_not_graph`` tells."""
    return _why_not(model, callback, "auto")


def _why_not(model: ECAR, callback: Callable | None, graphs: bool | str) -> str | None:
    if not graphs:
        return "graphs=False"
    if callback is not None:
        return "a callback is Python code at every step"
    return graph.device_reason(model.device)


def _warn_of_missing_kernels(device: torch.device) -> None:
    """Once a process and reason. A backend that was named raises where it lacks something."""
    if device.type != "cuda" or active_backend() != "auto":
        return
    for what, reason, cost in (
        (
            "the CUDA half of the C++ library",
            inspection.why_not_cuda(),
            "what lies between two network calls, the jumps between stages and the noise run as "
            "many small operations of torch in place of one kernel each",
        ),
        (
            "Triton",
            inspection.why_not_triton(),
            "attention and the fused layers run as separate operations of torch",
        ),
    ):
        if reason is not None and (what, reason) not in _said:
            _said.add((what, reason))
            warnings.warn(
                f"ecar samples on {device} without {what}: {reason}. So {cost}, which is slower; "
                "`python -m ecar_kernels` and SampleOutput.served show what serves each op.",
                RuntimeWarning,
                stacklevel=3,
            )


def run_eagerly(
    model: ECAR,
    shape: Shape,
    labels: Tensor,
    seeds: Tensor,
    scales: Sequence[Sequence[float]],
    grid: Grid = 1.0,
    *,
    progress: Callable[[int], object] | None = None,
    callback: Callable[[StepInfo], Tensor | None] | None = None,
) -> tuple[list[Tensor], dict[str, str]]:
    """A run without a graph: the end state of every stage, and what served it.

    Args:
        model, shape: of the run.
        labels, seeds, scales: int64 [B] each, and every step's guidance scale.
        grid: where the steps lie, of ``check_grid``.
        progress, callback: as ``loop.run``'s.

    Raises:
        torch.OutOfMemoryError: the device has too little memory for the batch.
    """

    def draw() -> tuple[list[Tensor], dict[str, str]]:
        inputs = Inputs(model, shape, device_data=False)
        inputs.load(labels, seeds, scales, grid)
        on_cpu = CpuEngine.serves(model, solver_class(shape.solver))
        engine = (CpuEngine if on_cpu else PlainEngine)(model, inputs)
        with loop.served_by() as served:
            ends = loop.run(engine, shape.counts, grid=grid, progress=progress, callback=callback)
        return ends, served

    try:
        return draw()
    except torch.OutOfMemoryError as error:
        reason = str(error)
    # Outside the except block: its traceback would keep the run's tensors alive.
    release_graphs(model)
    raise torch.OutOfMemoryError(
        f"sampling {shape.batch} images with {sum(shape.counts)} steps needs more memory than "
        f"{model.device} has free; draw fewer at a time ({reason})"
    )


_tf32_lock = threading.Lock()
_tf32_wishes: list[list[bool]] = []  # of the runs under way, in all threads; one wish in each
_tf32_before = ""  # torch's setting before the first of them


@contextlib.contextmanager
def _tf32(wanted: bool | None) -> Iterator[None]:
    """Products of float32 matrices on CUDA in TF32 or not, within the block.

    The setting is the process's: of runs that overlap the one begun last has its way, and after
    the last of them torch's own setting is back, in whatever order they end.
    """
    if wanted is None:
        yield
        return
    global _tf32_before
    # Not `allow_tf32`: reading it raises where the setting was made by its newer name, this one.
    products, wish = torch.backends.cuda.matmul, [wanted]
    with _tf32_lock:
        if not _tf32_wishes:
            _tf32_before = products.fp32_precision
        _tf32_wishes.append(wish)
        _set_tf32(wanted)
    try:
        yield
    finally:
        with _tf32_lock:
            _tf32_wishes[:] = [other for other in _tf32_wishes if other is not wish]
            if _tf32_wishes:
                _set_tf32(_tf32_wishes[-1][0])
            elif products.fp32_precision != _tf32_before:
                products.fp32_precision = _tf32_before


def _set_tf32(wanted: bool) -> None:
    products = torch.backends.cuda.matmul
    if (products.fp32_precision == "tf32") != wanted:
        products.fp32_precision = "tf32" if wanted else "ieee"


def _check_seeds(seeds: object, batch: int) -> None:
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
        came = seeds.dtype if isinstance(seeds, Tensor) else type(seeds).__name__
        raise TypeError(f"argument 'seeds': expected an int64 tensor, got {came}")
    if tuple(seeds.shape) != (batch,):
        raise ValueError(
            f"argument 'seeds': expected shape [{batch}], one for each class label, got "
            f"{list(seeds.shape)}"
        )

"""Sampling: stage by stage, N_s solver steps each, and the jump between stages (section 3.4).

The run itself is a ``Plan`` (plan.py); on a CUDA device it is captured as a graph and replayed
(graphs.py).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ecar import graphs as cuda_graphs
from ecar.graphs import CaptureError, release_graphs
from ecar.guidance import SCHEDULES, Guidance, split_steps
from ecar.model import ECAR, check_labels
from ecar.plan import Plan, Shape
from ecar_kernels import _native, _triton, active_backend

__all__ = [
    "SCHEDULES",
    "SOLVERS",
    "Guidance",
    "SampleOutput",
    "StepInfo",
    "release_graphs",
    "sample",
    "split_steps",
    "why_not_graphs",
]

SOLVERS = ("euler", "heun")

_log = logging.getLogger(__name__)
_said: set[str | tuple[str, str]] = set()  # reasons, each told once a process


@dataclass(frozen=True)
class StepInfo:
    """What the callback is told after each step.

    ``latents`` [B, C, h, w] is the state after the step, at this stage's resolution. A tensor
    of the same shape, returned by the callback, takes its place, except at a stage's last step
    where the jump to the next stage has been made with it.
    """

    index: int  # steps done before this one, over all stages
    total: int
    stage: int  # counted from 1
    tau: float  # time within the stage at which the step began
    latents: Tensor


@dataclass(frozen=True)
class SampleOutput:
    """What ``sample`` returns.

    Attributes:
        latents: [B, C, H, W], float32.
        stage_ends: with ``return_stage_ends``, the end state of every stage, coarse to fine.
        why_not_graph: None where a CUDA graph was replayed, else the reason.
        served: for each op of ``ecar_kernels`` that drew them, the backend that served it, or
            several, as in "native, reference". A model's class is there too, with "torch" where
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
    steps: int | Sequence[int] = 250,
    solver: str = "euler",
    guidance_scale: float = 1.0,
    guidance_schedule: str = "constant",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    callback: Callable[[StepInfo], Tensor | None] | None = None,
    progress: bool = False,
    return_stage_ends: bool = False,
    graphs: bool | str = "auto",
    tf32: bool | None = None,
) -> SampleOutput:
    """Draw one latent for each class and seed.

    An image depends on its class, its seed and the settings alone, not on its place in the
    batch, on the batch's size or on the device (to rounding).

    On a CUDA device the first call of a kind captures a CUDA graph of the whole image, and all
    calls of that kind replay it. A kind is a batch size, steps, a solver, which steps are guided,
    a backend, and the format of numbers; classes, seeds and guidance scales are free. The model's
    8 last used graphs are kept, with memory for the largest; ``release_graphs`` frees it.

    Args:
        model: on any device; its weights' dtype is that of the network calls, the state itself
            is float32. bfloat16 is ``model.to(torch.bfloat16)``.
        class_labels: int64 [B] in [0, num_classes).
        seeds: int64 [B].
        steps: network calls (Euler) of all stages together, or of each stage in a list. Heun
            makes two calls a step.
        solver: "euler" (order 1) or "heun" (order 2).
        guidance_scale, guidance_schedule, guidance_interval: see ``Guidance``.
        callback: called after each step; a returned tensor replaces the state. There is no graph
            then.
        progress: show a progress bar; a graph's steps come all at once.
        return_stage_ends: keep the end state of every stage.
        graphs: "auto" uses a CUDA graph where one can be had, and says in
            ``SampleOutput.why_not_graph`` why not; True raises instead; False never does.
        tf32: matrix products of a float32 model on CUDA in TF32 (10 bits of mantissa) or not;
            None is torch's own setting, which is not.

    Warns:
        RuntimeWarning: on a CUDA device, once for each reason why its kernels are missing.

    Raises:
        TypeError, ValueError: naming the argument.
        RuntimeError: ``graphs=True`` and there can be none.
        torch.OutOfMemoryError: the device has too little memory for the batch.
    """
    config, batch = model.config, len(class_labels)
    check_labels(class_labels, config.num_classes)
    _check_seeds(seeds, batch)
    counts = split_steps(steps, config.num_stages)
    if solver not in SOLVERS:
        raise ValueError(f"argument 'solver': expected one of {SOLVERS}, got {solver!r}")
    if graphs not in (True, False, "auto"):
        raise ValueError(f"argument 'graphs': expected True, False or 'auto', got {graphs!r}")
    if tf32 not in (None, True, False):
        raise ValueError(f"argument 'tf32': expected True, False or None, got {tf32!r}")
    scales = Guidance(guidance_scale, guidance_schedule, guidance_interval).scales(counts)
    guided = tuple(tuple(scale != 1.0 for scale in values) for values in scales)
    shape = Shape(batch, tuple(counts), solver, guided)
    data = (class_labels, seeds, scales)
    _warn_of_missing_kernels(model.device)

    # Buffers that outlive the call must be normal tensors, also where the caller is in
    # inference mode.
    with torch.inference_mode(False), torch.no_grad(), _tf32(tf32):
        ends, served, reason = None, {}, _why_not(model, callback, graphs)
        if reason is None:
            try:
                ends, served = cuda_graphs.graphs_of(model).draw(model, shape, *data)
            except CaptureError as error:
                reason = str(error)
        if ends is None and graphs is True:
            raise RuntimeError(f"argument 'graphs': expected 'auto' or False: {reason}")
        with tqdm(total=sum(counts), disable=not progress, desc="sampling", unit="step") as bar:
            if ends is None:
                if graphs and reason not in _said:
                    _said.add(reason)
                    _log.info("sampling without CUDA graphs: %s", reason)
                ends, served = _run(model, shape, data, _watch(counts, bar, callback))
            else:
                if progress:
                    torch.cuda.synchronize(model.device)
                bar.update(sum(counts))
    return SampleOutput(ends[-1], ends if return_stage_ends else None, reason, dict(served))


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
    return cuda_graphs.device_reason(model.device)


def _warn_of_missing_kernels(device: torch.device) -> None:
    """Once a process and reason. A backend that was named raises where it lacks something."""
    if device.type != "cuda" or active_backend() != "auto":
        return
    for what, reason, cost in (
        (
            "the CUDA half of the C++ library",
            _native.why_not_cuda(),
            "what lies between two network calls, the jumps between stages and the noise run as "
            "many small operations of torch in place of one kernel each",
        ),
        (
            "Triton",
            _triton.why_not(),
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


def _run(
    model: ECAR, shape: Shape, data: tuple, watch: Callable
) -> tuple[list[Tensor], dict[str, str]]:
    try:
        plan = Plan(model, shape, device_scales=False)
        plan.load(*data)
        return plan.run(model, watch), plan.served
    except torch.OutOfMemoryError as error:
        reason = str(error)
    # Outside the except block: its traceback would keep the run's tensors alive.
    release_graphs(model)
    raise torch.OutOfMemoryError(
        f"sampling {shape.batch} images with {sum(shape.counts)} steps needs more memory than "
        f"{model.device} has free; draw fewer at a time ({reason})"
    )


def _watch(counts: list[int], bar: tqdm, callback: Callable | None) -> Callable:
    def watch(stage: int, step: int, image: Callable[[], Tensor]) -> Tensor | None:
        bar.update()
        if callback is None:
            return None
        state = image()
        count = counts[stage - 1]
        before = sum(counts[: stage - 1])
        info = StepInfo(before + step, sum(counts), stage, step / count, state)
        shown = state.clone()
        replaced = callback(info)
        if replaced is None or replaced is state:
            if torch.equal(state, shown):
                return None
            replaced = state  # edited in place, which means the same
        return _checked_state(replaced, state, step == count - 1 and stage < len(counts))

    return watch


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


def _checked_state(replaced: object, state: Tensor, jumped: bool) -> Tensor:
    if jumped:
        raise ValueError(
            "callback: a state returned at the last step of a stage comes too late, the jump to "
            "the next stage has been made"
        )
    if not isinstance(replaced, Tensor) or replaced.shape != state.shape:
        came = list(replaced.shape) if isinstance(replaced, Tensor) else type(replaced).__name__
        raise ValueError(
            f"callback: expected None or a tensor of shape {list(state.shape)}, got {came}"
        )
    return replaced.to(state)


def _check_seeds(seeds: object, batch: int) -> None:
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
        came = seeds.dtype if isinstance(seeds, Tensor) else type(seeds).__name__
        raise TypeError(f"argument 'seeds': expected an int64 tensor, got {came}")
    if tuple(seeds.shape) != (batch,):
        raise ValueError(
            f"argument 'seeds': expected shape [{batch}], one for each class label, got "
            f"{list(seeds.shape)}"
        )

"""Measures launch settings on this machine's GPU: what `ecar tune` runs and writes.

Each op is run on random inputs under every setting of its family's candidates. One that
does not compile, or whose answer is not the usual setting's to rounding, is left out before any
is timed. Times are of CUDA graphs, in turn, and their medians decide.
"""

import contextlib
import importlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ecar_kernels import _triton, tuning
from ecar_kernels.registry import DECLARED

TUNED_FAMILIES = tuple(name for name, family in DECLARED.items() if family.tuning)
ROUNDS = 15
# What is no faster than this is noise: then the usual settings stay.
GAIN = 0.98
CALLS = 20  # in one graph, so that its launch is no part of the time

Clock = Callable[[Callable[[], object]], Callable[[], float]]


@dataclass(frozen=True)
class Shape:
    """What a model computes at once: `tokens` of each of `images`, `width` channels.

    hidden: the MLP's channels. stages: tokens of all stages that are attended to, of which the
    newest are `tokens`, by `heads`; without them there is no attention.
    """

    width: int
    hidden: int
    tokens: int
    images: int = 1
    stages: tuple[int, ...] = ()
    heads: int = 1

    @property
    def rows(self) -> int:
        return self.images * self.tokens


@dataclass(frozen=True)
class Problem:
    """One op on one shape. run: calls the op on inputs of its own and gives its results."""

    op: str
    key: tuple
    rows: int
    usual: object
    candidates: tuple
    run: Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Choice:
    """What was measured for one problem; times in seconds."""

    problem: Problem
    settings: Any
    seconds: float
    usual_seconds: float
    tried: int
    wrong: int  # did not run, or gave another answer

    def entry(self) -> dict:
        """As tuning.write takes it."""
        return {
            "op": self.problem.op,
            "key": list(self.problem.key),
            "rows": self.problem.rows,
            "settings": asdict(self.settings),
            "microseconds": round(1e6 * self.seconds, 2),
            "usual_microseconds": round(1e6 * self.usual_seconds, 2),
        }


def why_not() -> str | None:
    """None where settings can be measured here, else the reason."""
    if _triton.interpreting():
        return "TRITON_INTERPRET is set: what is interpreted cannot be timed"
    return _triton.why_not()


def problems(
    shape: Shape,
    dtype: torch.dtype,
    families: Sequence[str] = TUNED_FAMILIES,
    *,
    device: str = "cuda",
    of: str = "launches",
) -> list[Problem]:
    """Every op of the families on that shape, forward and backward.

    of: "launches" of Triton's kernels, or "backends", to be measured after those. A family's
    tuning cases (ecar_kernels/<family>/tuning_cases.py) have `runs(shape, dtype, device)`, the
    calls, each with its results, `candidates(op, key, rows, sms, arch)`, the settings to try for
    what a call asks of `tuning.choose` and, where there are backends to choose from,
    `backend_runs`.
    """
    found: dict[tuple, Problem] = {}
    for family in families:
        its = importlib.import_module(cast("str", DECLARED[family].tuning))
        runs = its.runs if of == "launches" else getattr(its, "backend_runs", _no_runs)
        for run in runs(shape, dtype, device):
            for problem in _asked(run, device, its.candidates):
                if hasattr(problem.usual, "backend") == (of == "backends"):
                    found[problem.op, problem.key, problem.rows] = problem
    return list(found.values())


def listed(shape: Shape, dtype: torch.dtype, device: str | None = None) -> Iterator[str]:
    """What the rules choose for the fused products of that shape, a line each, and what their
    model says of it. On that GPU, else on an H100."""
    index = None if device is None else torch.device(device).index
    chip = (132, 90)
    if device is not None:
        chip = _triton.multiprocessors(index), _triton.architecture(index)
    its = importlib.import_module(cast("str", DECLARED["flow_block"].tuning))
    yield from its.listed(shape, dtype, *chip)


def _no_runs(shape: Shape, dtype: torch.dtype, device: str) -> tuple:
    return ()


def _asked(
    run: Callable[[], Sequence[Tensor]], device: str, candidates: Callable[..., Sequence]
) -> list[Problem]:
    """The settings that the run asks for, each as a problem."""
    with tuning.recording() as asked:
        run()
    index = torch.device(device).index
    chip = _triton.multiprocessors(index), _triton.architecture(index)
    return [
        Problem(
            op,
            key,
            rows,
            usual,
            tuple(dict.fromkeys((usual, *candidates(op, key, rows, *chip)))),
            run,
        )
        for op, key, rows, usual in asked
    ]


def measure(problem: Problem, clock: Clock | None = None, rounds: int = ROUNDS) -> Choice:
    """The fastest setting that is right. `clock(run)` prepares a run, and gives what times it."""
    clock = graph_clock if clock is None else clock
    with tuning.forced(**{problem.op: problem.usual}):
        expected = [result.clone() for result in problem.run()]
        timers = {problem.usual: clock(problem.run)}
    wrong = 0
    for its in problem.candidates:
        if its == problem.usual:
            continue
        with tuning.forced(**{problem.op: its}):
            try:
                right = same(problem.run(), expected)
                if right:
                    timers[its] = clock(problem.run)
            except Exception:  # too much shared memory, say: the compiler's errors are many
                right = False
        wrong += not right
    times: dict[object, list[float]] = {its: [] for its in timers}
    for _ in range(rounds):
        for its, timer in timers.items():
            times[its].append(timer())
    medians = {its: statistics.median(measured) for its, measured in times.items()}
    usual = medians[problem.usual]
    best = min(medians, key=medians.__getitem__)
    if medians[best] > GAIN * usual:
        best = problem.usual
    return Choice(problem, best, medians[best], usual, len(medians), wrong)


def same(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Equal to rounding: sums may be added up in another order, no more."""
    for result, wanted in zip(results, expected, strict=True):
        rounding = torch.finfo(wanted.dtype).eps
        allowed = (64 if wanted.dtype is torch.float32 else 2) * rounding
        wanted = wanted.double()
        error = (result.double() - wanted).square().mean().sqrt()
        if not error <= allowed * wanted.square().mean().sqrt():  # NaN is wrong too
            return False
    return True


@contextlib.contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """Where problems are made and measured on a GPU: a stream that is not the default one.

    Backward runs on its forward's stream, and the default stream cannot be captured.
    """
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def graph_clock(run: Callable[[], object]) -> Callable[[], float]:
    """Captures `CALLS` calls, within `measuring`; each timing replays them, in seconds a call."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(CALLS):
            run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / CALLS

    seconds()
    return seconds

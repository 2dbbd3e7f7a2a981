"""Measures launch settings on this machine's GPU: what `ecar tune` runs and writes.

Each op is run on random inputs under every setting of its family's `launch.candidates`. One that
does not compile, or whose answer is not the usual setting's to rounding, is left out before any
is timed. Times are of CUDA graphs, in turn, and their medians decide.
"""

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ecar_kernels import _triton, tuning
from ecar_kernels.adaln import launch as adaln_launch
from ecar_kernels.flow_block import launch as flow_block_launch
from ecar_kernels.registry import FAMILIES, resolve
from ecar_kernels.stage_attention import launch as attention_launch

# What `problems` makes of widths and rows; stage attention has `attention_problems`.
TUNED_FAMILIES = ("adaln", "flow_block")
ROUNDS = 15
# What is no faster than this is noise: then the usual settings stay.
GAIN = 0.98
CALLS = 20  # in one graph, so that its launch is no part of the time

Clock = Callable[[Callable[[], object]], Callable[[], float]]


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
    settings: object
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
    widths: Sequence[int],
    rows: Sequence[int],
    dtype: torch.dtype,
    families: Sequence[str] = TUNED_FAMILIES,
    *,
    mlp_ratio: float = 4.0,
    device: str = "cuda",
) -> list[Problem]:
    """Every op of the families, forward and backward, at each width and number of rows."""
    found: dict[tuple, Problem] = {}
    for family in families:
        for channels in widths:
            for count in rows:
                for run in _RUNS[family](channels, int(mlp_ratio * channels), count, dtype, device):
                    problem = _asked(run, device)[-1]
                    found[problem.op, problem.key, problem.rows] = problem
    return list(found.values())


def attention_problems(
    stage_lengths: Sequence[int],
    queries: int,
    batch: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    device: str = "cuda",
) -> list[Problem]:
    """Stage attention of the newest `queries` tokens: forward, and both kernels of backward."""
    function = resolve(
        "stage_attention", device=device, dtype=dtype, width=head_dim, backend="triton"
    )
    q, k, v = (
        torch.randn(batch, tokens, heads, head_dim, dtype=dtype, device=device, requires_grad=True)
        for tokens in (queries, sum(stage_lengths), sum(stage_lengths))
    )
    stage_lengths = list(stage_lengths)

    def forward():
        with torch.no_grad():
            return _several(function(q, k, v, stage_lengths))

    out = function(q, k, v, stage_lengths)
    gradient = torch.randn_like(out)

    def backward():
        return torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)

    return [*_asked(forward, device), *_asked(backward, device)]


def _asked(run: Callable[[], Sequence[Tensor]], device: str) -> list[Problem]:
    """The settings that the run asks for, each as a problem."""
    with tuning.recording() as asked:
        run()
    return [
        Problem(
            op,
            key,
            rows,
            usual,
            tuple(dict.fromkeys((usual, *_candidates(op, key, rows, device)))),
            run,
        )
        for op, key, rows, usual in asked
    ]


def _candidates(op: str, key: tuple, rows: int, device: str) -> list:
    index = torch.device(device).index
    arch = _triton.architecture(index)
    if op in FAMILIES["flow_block"]:
        return flow_block_launch.candidates(rows, *key, _triton.multiprocessors(index), arch)
    if op in attention_launch.OPS:
        return attention_launch.candidates(op, *key[:2], arch)
    return adaln_launch.candidates(op, key[0], rows, arch)


def _adaln_runs(channels: int, hidden: int, rows: int, dtype: torch.dtype, device: str):
    def tensors(count: int) -> list[Tensor]:
        return [
            torch.randn(1, rows, channels, dtype=dtype, device=device, requires_grad=True)
            for _ in range(count)
        ]

    for op, count in (("adaln", 3), ("gated_residual", 3), ("gated_residual_adaln", 5)):
        function = resolve(op, device=device, dtype=dtype, width=channels, backend="triton")
        inputs = tensors(count)
        # As in training: one modulation for each token, and one for the step.
        step = torch.randn(1, 1, channels, dtype=dtype, device=device, requires_grad=True)
        steps = {"step_gate" if op == "gated_residual" else "step_scale": step}

        def forward(function=function, inputs=inputs, steps=steps):
            with torch.no_grad():
                return _several(function(*inputs, **steps))

        outputs = _several(function(*inputs, **steps))
        gradients = [torch.randn_like(output) for output in outputs]

        def backward(outputs=outputs, inputs=(*inputs, step), gradients=gradients):
            return torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)

        yield forward
        yield backward


def _flow_block_runs(channels: int, hidden: int, rows: int, dtype: torch.dtype, device: str):
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    bound = {
        op: resolve(op, device=device, dtype=dtype, width=channels, backend="triton")
        for op in FAMILIES["flow_block"]
    }
    for outputs in (3 * channels, hidden):
        args = (
            *(normal(1, rows, channels) for _ in range(3)),
            normal(outputs, channels) * channels**-0.5,
            normal(outputs),
        )
        yield lambda args=args: _several(bound["adaln_linear"](*args, activation="gelu_tanh"))
    for inputs in (channels, hidden):
        args = (
            normal(1, rows, inputs),
            normal(channels, inputs) * inputs**-0.5,
            normal(channels),
            normal(1, rows, channels),
            normal(1, rows, channels),
        )
        yield lambda args=args: _several(bound["linear_gated_residual"](*args))


_RUNS = {"adaln": _adaln_runs, "flow_block": _flow_block_runs}


def _several(results: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


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

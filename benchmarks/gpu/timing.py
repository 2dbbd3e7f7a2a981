"""Device time of calls: CUDA-graph replays between events, variants in turn, medians.

An event pair around single launches times the host that is late with them. So the calls of a
variant, one for each set of inputs, are captured as one graph, and a replay is timed. What can't
be captured is queued behind a kernel that waits ("stream"). Without a GPU, the host's clock counts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks import timing
from benchmarks.gpu.work import Work
from ecar.sampling.graph import CudaRecorder

Call = Callable[[], Any]
WAIT_CYCLES = 20_000_000  # about 10 ms: time to queue the calls behind it
COPY_BYTES, SIDE, LAUNCHES = 2**30, 8192, 1000


class Timer:
    """One variant's calls, warmed up, ready to be timed as often as needed."""

    def __init__(self, calls: Sequence[Call]) -> None:
        # All results alive together: in a graph, each call writes to memory of its own.
        self.run: Call = lambda: [call() for call in calls]
        self.count, self.how = len(calls), "host"
        for call in calls[:3]:
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.how = "stream"
            try:
                recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
                self.run, self.how = recorder.record(self.run), "graph"
                self.run()
            except RuntimeError:
                torch.cuda.synchronize()

    def once(self) -> float:
        """Seconds of one call, the mean over the sets of inputs."""
        if self.how == "host":
            return timing.seconds_of(self.run) / self.count
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if self.how == "stream":
            torch.cuda._sleep(WAIT_CYCLES)
        begin.record()
        self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.count


def interleave(timers: Mapping[str, Timer], seconds: float) -> dict[str, dict[str, Any]]:
    """Median and quartiles of each, one measurement a round, for `seconds`."""
    times = timing.rounds({name: timer.once for name, timer in timers.items()}, seconds)
    return {
        name: timing.summary(found) | {"how": timers[name].how} for name, found in times.items()
    }


def wall(call: Call, seconds: float, at_least: int) -> dict[str, Any]:
    """Of a call's wall time, until the device has finished."""

    def measure() -> float:
        synchronize()
        return timing.seconds_of(lambda: (call(), synchronize()))

    return timing.summary(timing.rounds({"": measure}, seconds, at_least=at_least)[""])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_rates(work: Work) -> None:
    """Rows {name, value, unit}: copies, launches in a graph, products by number format."""
    size, side, count = (2**16, 64, 10) if work.dry else (COPY_BYTES, SIDE, LAUNCHES)

    def median(calls: Sequence[Call]) -> float:
        return interleave({"": Timer(calls)}, work.span(1.0))[""]["median"]

    source, one = torch.randn(size // 4, device=work.device), torch.zeros(1, device=work.device)
    target = torch.empty_like(source)
    copy = median([lambda: target.copy_(source)])
    work.add("copy", value=2 * size / copy, unit="bytes/s")
    work.add("launch", value=median([lambda: one.add_(1)] * count), unit="s")
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("float32", torch.float32, "ieee"),
    ):
        torch.backends.cuda.matmul.fp32_precision = precision
        a, b = (torch.randn(side, side, device=work.device).to(dtype) for _ in range(2))
        product = median([lambda a=a, b=b: a @ b])
        work.add(name, value=side**3 / product, unit="multiply-adds/s")

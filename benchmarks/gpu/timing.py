"""Device time of calls: CUDA-graph replays between events, variants in turn, medians.

An event pair around single launches times the host that is late with them. So the calls of a
variant, one for each set of inputs, are captured as one graph, and a replay is timed. What can't
be captured is queued behind a kernel that waits, and said to be so ("stream").
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ecar.sampling.graph import CudaRecorder

Call = Callable[[], Any]
WAIT_CYCLES = 20_000_000  # about 10 ms: time to queue the calls behind it


class Timer:
    """One variant's calls, warmed up, ready to be timed as often as needed."""

    def __init__(self, calls: Sequence[Call], *, capture: bool = True) -> None:
        self.calls = calls
        for call in calls[:3]:
            call()
        self.how, self._replay = "host", None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.how = "stream"
            if capture:
                self._capture()

    def _capture(self) -> None:
        def run() -> None:
            # All alive together: each call writes to memory of its own.
            outputs = [call() for call in self.calls]
            del outputs

        try:
            recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
            self._replay, self.how = recorder.record(run), "graph"
        except RuntimeError:
            torch.cuda.synchronize()
            return
        self._replay()

    def once(self) -> float:
        """Seconds of one call, the mean over the sets of inputs."""
        if self.how == "host":
            begin = time.perf_counter()
            self._run()
            return (time.perf_counter() - begin) / len(self.calls)
        torch.cuda.synchronize()
        if self.how == "stream":
            torch.cuda._sleep(WAIT_CYCLES)
        self._begin.record()
        self._run()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3 / len(self.calls)

    def _run(self) -> None:
        if self._replay is not None:
            self._replay()
            return
        for call in self.calls:
            call()


def interleave(
    timers: Mapping[str, Timer], seconds: float, *, rounds: int = 5
) -> dict[str, dict[str, Any]]:
    """Quartiles of each variant, one measurement a round, for `seconds` or at least `rounds`."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()), [0] * rounds)) < rounds or time.perf_counter() < end:
        for name, timer in timers.items():
            times[name].append(timer.once())
    return {name: summary(values) | {"how": timers[name].how} for name, values in times.items()}


def summary(values: Sequence[float]) -> dict[str, Any]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "rounds": len(values)}


def wall(
    calls: Mapping[str, Call], seconds: float, *, rounds: int = 5
) -> dict[str, dict[str, Any]]:
    """Quartiles of each call's wall time, until the device has finished, one a round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()), [0] * rounds)) < rounds or time.perf_counter() < end:
        for name, call in calls.items():
            synchronize()
            begin = time.perf_counter()
            call()
            synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: summary(values) for name, values in times.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

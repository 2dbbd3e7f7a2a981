"""How a CUDA graph is captured: what must not happen while it is."""

import contextlib
import gc
import threading
import weakref
from unittest.mock import MagicMock

import pytest
import torch

from ecar.sampling.graph import CudaRecorder


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda, as far as the recorder needs it: nothing is captured, `run` runs."""
    for name in (
        "Stream",
        "Event",
        "CUDAGraph",
        "graph_pool_handle",
        "current_stream",
        "set_stream",
    ):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", MagicMock(), raising=False)


class Cycle:
    """What only the collector frees."""

    def __init__(self):
        self.itself = self


class TestNoGarbageIsCollectedInACapture:
    """What is collected may be a CUDA object, and destroying it would break the capture."""

    @pytest.fixture(autouse=True)
    def as_it_was(self):
        enabled = gc.isenabled()
        yield
        (gc.enable if enabled else gc.disable)()

    @pytest.mark.parametrize("enabled", [True, False])
    @pytest.mark.parametrize("error", [None, RuntimeError("no"), KeyboardInterrupt()])
    def test_whatever_becomes_of_it(self, fake_cuda, enabled, error):
        before, seen = weakref.ref(Cycle()), []

        def run():
            during = weakref.ref(Cycle())
            kept = [[] for _ in range(2 * gc.get_threshold()[0])]  # as many as set it off
            seen.append((gc.isenabled(), before() is None, during() is not None, len(kept) > 0))
            if error is not None:
                raise error

        (gc.enable if enabled else gc.disable)()
        recorder = CudaRecorder(torch.device("cuda", 0))
        with contextlib.nullcontext() if error is None else pytest.raises(type(error)):
            recorder.record(run)
        assert gc.isenabled() is enabled
        assert seen == [(False, True, True, True)]

    def test_two_threads_capture_in_turn(self, fake_cuda):
        """Else the first that ends would switch the collector on for the other."""
        recorder = CudaRecorder(torch.device("cuda", 0))
        entered, ended, seen = threading.Event(), threading.Event(), []

        def second():
            entered.set()
            ended.wait(10)
            seen.append(gc.isenabled())

        thread = threading.Thread(target=recorder.record, args=(second,))

        def first():
            thread.start()
            entered.wait(0.2)
            seen.append(gc.isenabled())

        gc.enable()
        recorder.record(first)
        ended.set()
        thread.join()
        assert seen == [False, False] and gc.isenabled()

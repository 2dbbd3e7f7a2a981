"""What programs of a launch count with: of streams, devices and CUDA graphs, and without."""

import pytest
import torch

import ecar_kernels
from ecar_kernels import _triton
from tools.fake_gpu import H100, FakeGPU, chip_of


def test_counters_are_a_streams_and_a_graphs():
    """What may run at the same time shares none; none is made while a graph is captured."""
    with FakeGPU(H100, chip_of(120), compile_kernels=False) as gpus:
        device, other, stream = (
            torch.device("cuda", 0),
            torch.device("cuda", 1),
            torch.cuda.Stream(),
        )
        graphs = [torch.cuda.CUDAGraph() for _ in range(3)]
        with torch.cuda.graph(graphs[0], stream=stream):
            assert _triton.counters(device, 5) is None  # they would lie in the graph's pool
        usual = _triton.counters(device, 5)
        found = [usual]
        with torch.cuda.stream(stream):
            found.append(_triton.counters(device, 5))
            for graph in graphs[1:]:
                with torch.cuda.graph(graph, stream=stream):
                    found.append(_triton.counters(device, 5))
                    assert _triton.counters(device, 7) is found[-1]
            assert _triton.counters(device, 5) is found[1]
        with torch.cuda.device(1):
            found.append(_triton.counters(other, 5))
        assert _triton.counters(device, 64) is usual
        assert len({id(zeros) for zeros in found}) == len(found) == 5
        assert all(zeros.shape == (64,) for zeros in found)
        more = _triton.counters(device, 65)
        assert more.shape == (128,) and _triton.counters(device, 5) is more
        assert _triton.counters(device, _triton._COUNTERS) is None
        assert [zeros.device for zeros in found] == [device] * 4 + [other]
        assert [launch.captured for launch in gpus.launches] == [False, False]  # a copy each


@pytest.mark.parametrize("lends", [0, 1])
def test_without_counters_normalising_is_a_launch_of_its_own(lends, monkeypatch):
    """On the stream that they do not suffice for."""
    monkeypatch.setattr(_triton, "_COUNTERS", 64 * lends)
    with FakeGPU(compile_kernels=False) as gpu, torch.no_grad():
        x = torch.empty(1, 4096, 128, dtype=torch.bfloat16, device="cuda")
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                ecar_kernels.adaln_linear(x, x, x, x.new_empty(128, 128), None)
    names = [launch.name for launch in gpu.launches if launch.kind == "triton"]
    assert names == ["normalise_and_multiply"] * lends + ["normalise_rows", "adaln_linear"] * (
        2 - lends
    )

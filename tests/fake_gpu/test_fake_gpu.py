"""The GPU that is not there refuses what a GPU refuses, and leaves the process as it was."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

import ecar_kernels
from tools.fake_gpu import FakeGPU, chip_of


@triton.jit
def scale(x, y, count, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < count) * factor, mask=at < count)


@triton.jit
def product(x, y, out, steps, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    at = at[:, None] * BLOCK + at[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(steps):
        total += tl.dot(tl.load(x + at), tl.load(y + at))
        x += BLOCK * BLOCK
        y += BLOCK * BLOCK
    tl.store(out + at, total)


def test_a_launch_is_compiled_for_the_chip_and_written_down():
    with FakeGPU() as gpu:
        x = torch.empty(1000, device="cuda")
        for factor in (2.0, 3.0):
            scale[(8,)](x, x, 1000, factor, BLOCK=128, num_warps=2)
        launch, again = gpu.launches
    assert (launch.kind, launch.name, launch.grid, launch.num_warps) == (
        "triton",
        "scale",
        (8, 1, 1),
        2,
    )
    assert launch == again and launch.registers > 0 and launch.stack == 0
    assert [name for name, _ in gpu.specialised] == ["scale"]


def test_too_much_shared_memory_and_too_many_threads():
    with FakeGPU(chip_of(120)) as gpu:
        x = torch.empty(8, 128 * 128, device="cuda", dtype=torch.float16)
        out = torch.empty(128, 128, device="cuda")
        with pytest.raises(OutOfResources, match=r"shared memory, Required: .* limit: 101376"):
            product[(1,)](x, x, out, 8, BLOCK=128, num_stages=3, num_warps=8)
        assert not gpu.launches
    with FakeGPU() as gpu:
        product[(1,)](x, x, out, 8, BLOCK=128, num_stages=3, num_warps=8)
        assert gpu.launches[0].shared > 101376
        with pytest.raises(OutOfResources, match="threads"):
            scale[(1,)](out, out, 8, 1.0, BLOCK=128, num_warps=64)


@pytest.mark.parametrize("compiled", [True, False])
def test_grids_and_devices(compiled):
    with FakeGPU(chip_of(90), chip_of(90), compile_kernels=compiled):
        x, other = torch.empty(8, device="cuda"), torch.empty(8, device="cuda:1")
        with pytest.raises(RuntimeError, match="65536 programs in y, at most 65535"):
            scale[(1, 65536)](x, x, 8, 1.0, BLOCK=128)
        for wrong in (other, torch.empty(8)):
            with pytest.raises(RuntimeError, match="launched on cuda:0, where a tensor on c"):
                scale[(1,)](x, wrong, 8, 1.0, BLOCK=128)
        with pytest.raises(RuntimeError, match="same device"):
            x + other
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.empty(8, device="cuda:2")


def test_what_a_capture_refuses():
    refused = {
        "reading back": lambda x: x.sum().item(),
        "to the host": lambda x: x.cpu(),
        "from the host": lambda x: x.copy_(torch.ones(8)),
        "a number": lambda x: torch.tensor([1.0], device="cuda"),
        "pageable": lambda x: x.copy_(torch.ones(8), non_blocking=True),
        "waiting": lambda x: torch.cuda.synchronize(),
    }
    with FakeGPU() as gpu:
        x = torch.empty(8, device="cuda")
        for name, call in refused.items():
            call(x)
            graph = torch.cuda.CUDAGraph()
            with (
                pytest.raises(RuntimeError, match="captur"),
                torch.cuda.graph(graph, stream=torch.cuda.Stream()),
            ):
                call(x)
            torch.cuda.set_stream(torch.cuda.default_stream())
            assert not torch.cuda.is_current_stream_capturing(), name
        graph = torch.cuda.CUDAGraph()
        pinned = torch.ones(8).pin_memory()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            x.copy_(pinned, non_blocking=True)
            x.add_(1)
        assert [launch.kind for launch in graph.launches] == ["copy", "aten"]
    assert all(launch.captured == (launch in graph.launches) for launch in gpu.launches[-2:])


def test_tensors_are_plain_ones_and_keep_values_where_asked():
    with FakeGPU(values=True) as gpu:
        x = torch.arange(6.0, device="cuda").view(2, 3)
        assert type(x) is torch.Tensor and x.is_cuda and x[1:, 1:].data_ptr() == 16
        assert (x + x).sum().item() == 30 and x[1].cpu().tolist() == [3, 4, 5]
        x[0] = 7
        assert x.cpu().sum() == 33
        layer = gpu.place(torch.nn.Linear(3, 2))
        assert type(layer.weight) is torch.nn.Parameter and layer.weight.device.type == "cuda"
        y = layer(x).square().sum()
        (gradient,) = torch.autograd.grad(y, layer.weight)
        expected = torch.nn.Linear(3, 2)
        expected.load_state_dict({name: value.cpu() for name, value in layer.state_dict().items()})
        host = x.cpu()
    (wanted,) = torch.autograd.grad(expected(host).square().sum(), expected.weight)
    with gpu:
        torch.testing.assert_close(gradient.cpu(), wanted)


def test_the_process_is_as_it_was():
    before = torch.cuda.is_available(), torch.cuda.device_count(), torch.autograd.grad
    with FakeGPU(compile_kernels=False):
        assert torch.cuda.get_device_properties(0).multi_processor_count == 132
        x = torch.empty(2, 16, 64, device="cuda")
        ecar_kernels.adaln(x, x, x)
    assert (torch.cuda.is_available(), torch.cuda.device_count(), torch.autograd.grad) == before
    with pytest.raises(RuntimeError):
        x + x  # what is on no GPU any more

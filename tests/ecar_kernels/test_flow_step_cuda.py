"""The flow step on CUDA: the accuracy rule, the CPU's noise, graphs, and wrong devices."""

import pytest
import torch

from ecar_kernels import _native, flow_boundary, use_backend
from ecar_kernels.flow_boundary import reference as boundary_reference
from ecar_kernels.flow_step import reference
from ecar_kernels.registry import KERNEL_DTYPES, resolve
from tests.support.accuracy import assert_accurate
from tests.support.ops import arguments

REASON = _native.why_not_cuda()
gpu = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
OPS = ("euler_step", "upsample_renoise_euler")


def boundary(
    dtype=torch.float32, guided=True, device="cpu", batch=2, tokens=16, channels=72, outputs=16
):
    rows = batch * (1 + guided)

    def normal(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    return {
        "x": normal(rows, tokens, channels),
        "state": normal(batch, tokens, outputs),
        "shift": normal(rows, tokens, 2 * channels)[..., :channels],
        "scale": normal(rows, 1, channels),
        "weight": normal(outputs, channels) / channels**0.5,
        "bias": normal(outputs),
        "embed_weight": normal(channels, outputs) / 4,
        "embed_bias": normal(channels),
        "positions": normal(tokens, channels),
        "dt": 0.125,
        "step_shift": normal(1, 1, channels),
        "step_scale": normal(rows, 1, channels),
        "guidance_scale": 1.5 if guided else 1.0,
    }


def on_gpu(call):
    return {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("guided", [False, True])
def test_the_boundary_is_its_formula(guided, dtype):
    """By hand in float64."""
    call = boundary(dtype, guided)
    wide = {
        name: value.double() if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }
    x = torch.nn.functional.layer_norm(wide["x"], (72,), eps=1e-6)
    x = x * (1 + wide["scale"] + wide["step_scale"]) + wide["shift"] + wide["step_shift"]
    v = x @ wide["weight"].T + wide["bias"]
    if guided:
        v = v[2:] + 1.5 * (v[:2] - v[2:])
    state = wide["state"] + 0.125 * v
    embedded = state @ wide["embed_weight"].T + wide["embed_bias"] + wide["positions"]
    found = boundary_reference.flow_boundary(**wide)
    torch.testing.assert_close(found[0], state)
    torch.testing.assert_close(found[1], torch.cat([embedded] * (1 + guided)))
    with use_backend("auto"):
        assert_accurate(flow_boundary, boundary_reference.flow_boundary, call)


@pytest.mark.parametrize(
    "name, change",
    [
        ("state", lambda c: c["state"][:, :-1]),
        ("weight", lambda c: c["weight"][:, :-1]),
        ("positions", lambda c: c["positions"].to("meta")),
        ("bias", lambda c: c["bias"].double()),
        ("embed_weight", lambda c: c["embed_weight"].T.contiguous().T),
        ("guidance_scale", lambda c: torch.tensor(1.0, dtype=torch.float64)),
        ("guidance_scale", lambda c: torch.tensor(1.0, device="meta")),
        ("guidance_scale", lambda c: float("nan")),
        ("eps", lambda c: 0.0),
    ],
)
def test_the_boundary_refuses(name, change):
    call = boundary()
    with pytest.raises((ValueError, TypeError), match=f"argument '{name}': expected"):
        flow_boundary(**call | {name: change(call)})


@pytest.mark.parametrize("op", OPS)
def test_a_scale_in_a_tensor_is_its_number(op):
    call = arguments(op)
    run = resolve(op, device="cpu", dtype=torch.float32)
    numbers, tensor = (
        run(**call | {"guidance_scale": scale}) for scale in (1.5, torch.tensor(1.5))
    )
    for a, b in zip(
        *((r if isinstance(r, tuple) else (r,)) for r in (numbers, tensor)), strict=True
    ):
        assert a.equal(b)


@pytest.mark.skipif(_native.load_cuda() is not None, reason=str(_native.load_cuda()))
@pytest.mark.parametrize("guided", [False, True])
def test_fakes_without_a_gpu(guided):
    """The library loads beside a CPU torch too; shapes and types need no device."""
    from ecar_kernels.flow_boundary import cuda

    call = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in boundary(torch.bfloat16, guided).items()
    }
    state, embedded = cuda.flow_boundary(**call)
    assert state.shape == call["state"].shape and embedded.shape == call["x"].shape


class TestOnTheGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
    @pytest.mark.parametrize("op", OPS)
    def test_accuracy(self, op, dtype):
        for optional in (True, False):
            call = on_gpu(arguments(op, dtype=dtype, optional=optional))
            cuda = resolve(op, device="cuda", dtype=dtype, backend="cuda")
            assert_accurate(cuda, getattr(reference, op), call)

    @pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
    @pytest.mark.parametrize("guided", [False, True])
    @pytest.mark.parametrize("tokens, channels", [(16, 72), (600, 1152), (5, 8192)])
    def test_boundary(self, tokens, channels, guided, dtype):
        call = boundary(dtype, guided, "cuda", tokens=tokens, channels=channels)
        cuda = resolve("flow_boundary", device="cuda", dtype=dtype, backend="cuda")
        assert_accurate(cuda, boundary_reference.flow_boundary, call)

    def test_the_same_seed_gives_the_cpu_s_noise(self):
        seeds = torch.randint(-(2**63), 2**63 - 1, (5,))
        for shape in ((4, 8, 8), (3, 5, 7)):
            ours, plain = (
                resolve("initial_noise", device=device, dtype=torch.float32)(
                    seeds, shape, device=device, dtype=torch.float32
                )
                for device in ("cuda", "cpu")
            )
            assert (ours.cpu() - plain).abs().max() <= 4e-6

    def test_a_graph_replays_with_another_scale(self):
        call = boundary(device="cuda") | {"guidance_scale": torch.tensor(1.5, device="cuda")}
        flow_boundary(**call)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), use_backend("cuda"):
            state, embedded = flow_boundary(**call)
        call["guidance_scale"].fill_(3.0)
        graph.replay()
        with use_backend("cuda"):
            expected = flow_boundary(**call | {"guidance_scale": 3.0})
        assert state.equal(expected[0]) and embedded.equal(expected[1])

    def test_wrong_devices_are_refused(self):
        call = on_gpu(arguments("euler_step"))
        with pytest.raises(RuntimeError, match="velocity"):
            torch.ops.ecar.euler_step(call["x"], call["velocity"].cpu(), 0.1, 1.5)

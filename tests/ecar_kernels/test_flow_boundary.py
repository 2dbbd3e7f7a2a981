"""The boundary between two network calls: its formula, and C++ and CUDA C++ against the
reference: accuracy, bits, outputs in place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ecar_kernels import _native, flow_boundary, use_backend
from ecar_kernels.flow_boundary import reference
from ecar_kernels.registry import KERNEL_DTYPES, resolve
from tests.support.accuracy import assert_accurate
from tests.support.native import needs_native

REASON = _native.why_not_cuda()
gpu = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
OPTIONAL = ("step_shift", "step_scale")


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


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("guided", [False, True])
def test_it_is_its_formula(guided, dtype):
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
    found = reference.flow_boundary(**wide)
    torch.testing.assert_close(found[0], state)
    torch.testing.assert_close(found[1], torch.cat([embedded] * (1 + guided)))
    with use_backend("auto"):
        assert_accurate(flow_boundary, reference.flow_boundary, call)


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
def test_what_it_refuses(name, change):
    call = boundary()
    with pytest.raises((ValueError, TypeError), match=f"argument '{name}': expected"):
        flow_boundary(**call | {name: change(call)})


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


def kernel(dtype=torch.float32):
    return resolve("flow_boundary", device="cpu", dtype=dtype, backend="cpp")


def in_place(call):
    """The outputs of `flow_boundary_out`, written over copies of the state and of x."""
    from ecar_kernels.flow_boundary.cpp import flow_boundary_out

    x, state = call["x"].clone(), call["state"].contiguous().clone()
    names = ("shift", "scale", "weight", "bias", "embed_weight", "embed_bias", "positions", "dt")
    flow_boundary_out(
        x,
        state,
        *(call[name] for name in names),
        *(call.get(name) for name in OPTIONAL),
        call["guidance_scale"],
        1e-6,
        state,
        x,
    )
    return state, x


@st.composite
def calls(draw):
    kinds = {
        "dtype": draw(st.sampled_from(KERNEL_DTYPES)),
        "guided": draw(st.booleans()),
        "batch": draw(st.integers(0, 3)),
        "tokens": draw(st.integers(0, 70)),
        "channels": draw(st.integers(1, 200)),
        "outputs": draw(st.integers(1, 64)),
    }
    torch.manual_seed(draw(st.integers(0, 2**32)))
    call = boundary(**kinds)
    if draw(st.booleans()):
        call["state"] = call["state"].float()
    if draw(st.booleans()):  # a view of more tokens and values
        room = torch.randn(len(call["state"]), 2 * kinds["tokens"], kinds["outputs"] + 3)
        call["state"] = room.to(call["state"].dtype)[:, ::2, 1:-2]
    for name in draw(st.sets(st.sampled_from(OPTIONAL))):
        del call[name]
    return call


@needs_native
@given(calls())
def test_outputs(call):
    assert_accurate(kernel(), reference.flow_boundary, call)


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("tokens, channels", [(16, 768), (64, 1024), (256, 1152)])
def test_the_models_sizes(tokens, channels, dtype):
    call = boundary(dtype, batch=1, tokens=tokens, channels=channels)
    call["state"] = call["state"].float()
    assert_accurate(kernel(), reference.flow_boundary, call)


@needs_native
@given(calls())
def test_in_place_gives_the_same_bits(call):
    for found, expected in zip(in_place(call), kernel()(**call), strict=True):
        assert found.equal(expected)


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_an_image_is_the_same_bits_in_every_batch_and_on_any_number_of_threads(dtype):
    call = boundary(dtype, batch=5, tokens=67, channels=130)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernel()(**call))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(Tensor.equal, results[0], other))
    for image in range(5):
        alone = {
            name: value[[image, 5 + image]]
            if isinstance(value, Tensor) and len(value) == 10
            else value
            for name, value in call.items()
        }
        state, embedded = kernel()(**alone | {"state": call["state"][image : image + 1]})
        assert state[0].equal(results[0][0][image])
        assert embedded.equal(results[0][1][[image, 5 + image]])


@needs_native
def test_without_guidance_a_scale_changes_nothing():
    """Both halves alike: u + g (c - u) is c."""
    call = boundary(guided=False)
    twice = {
        name: value.repeat(2, 1, 1) if name in ("x", "shift", "scale", "step_scale") else value
        for name, value in call.items()
    }
    alone, doubled = kernel()(**call), kernel()(**twice | {"guidance_scale": 3.0})
    assert doubled[0].equal(alone[0]) and doubled[1].equal(alone[1].repeat(2, 1, 1))


@needs_native
def test_auto_takes_it():
    assert (
        resolve("flow_boundary", device="cpu", dtype=torch.float32, width=768, backend="auto")
        is kernel()
    )


def out_arguments():
    """Of the op itself, with outputs apart from its inputs."""
    call = boundary()
    out = torch.empty_like(call["state"]), torch.empty_like(call["x"])
    return (
        *(
            call[name]
            for name in (
                "x",
                "state",
                "shift",
                "scale",
                "weight",
                "bias",
                "embed_weight",
                "embed_bias",
                "positions",
                "dt",
                *OPTIONAL,
            )
        ),
        1.5,
        1e-6,
        *out,
    )


@needs_native
def test_opcheck():
    kernel()  # its fakes
    arguments = out_arguments()
    torch.library.opcheck(torch.ops.ecar.flow_boundary_out.default, arguments)
    torch.library.opcheck(torch.ops.ecar.flow_boundary.default, arguments[:-2])


@needs_native
@torch.no_grad()
def test_inductor_equals_eager():
    torch._dynamo.reset()
    for guided in (False, True):
        call = boundary(guided=guided)
        with use_backend("cpp"):
            compiled = torch.compile(flow_boundary, fullgraph=True)(**call)
            assert all(map(Tensor.equal, compiled, flow_boundary(**call)))


@needs_native
@pytest.mark.parametrize(
    "index, wrong, message",
    [
        (1, lambda a: a[1][:1], "'x': expected as many images as the state or twice as many"),
        (1, lambda a: a[1].double(), "'state': expected float32 or the type of x"),
        (1, lambda a: torch.randn(2, 16, 65), "'state': expected at most 64 outputs"),
        (4, lambda a: a[4].T.contiguous().T, "'weight': expected a contiguous"),
        (14, lambda a: a[14][:, :-1], "'new_state': expected"),
        (
            14,
            lambda a: torch.empty(2, 16, 32)[..., :16],
            "'new_state': expected a contiguous tensor",
        ),
        (15, lambda a: a[15].half(), "'embedded': expected the first argument's type"),
        (15, lambda a: a[0].flatten()[4:], "'embedded': expected"),
    ],
)
def test_a_wrong_call_of_the_op_itself_is_refused(index, wrong, message):
    kernel()
    arguments = list(out_arguments())
    arguments[index] = wrong(arguments)
    with pytest.raises(RuntimeError, match=f"argument {message}"):
        torch.ops.ecar.flow_boundary_out(*arguments)


@needs_native
def test_an_output_that_overlaps_an_input_is_refused():
    kernel()
    arguments = list(out_arguments())
    room = torch.randn(4 * 16 * 72 + 8)
    arguments[0] = room[:-8].view(4, 16, 72)
    arguments[15] = room[8:].view(4, 16, 72)
    with pytest.raises(RuntimeError, match="argument 'embedded': expected memory apart"):
        torch.ops.ecar.flow_boundary_out(*arguments)


class TestOnTheGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
    @pytest.mark.parametrize("guided", [False, True])
    @pytest.mark.parametrize("tokens, channels", [(16, 72), (600, 1152), (5, 8192)])
    def test_accuracy(self, tokens, channels, guided, dtype):
        call = boundary(dtype, guided, "cuda", tokens=tokens, channels=channels)
        cuda = resolve("flow_boundary", device="cuda", dtype=dtype, backend="cuda")
        assert_accurate(cuda, reference.flow_boundary, call)

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

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


def with_history(call, ratio=0.7):
    """The call, of a solver of several steps."""
    previous = torch.randn_like(call["state"].float()).to(call["state"].dtype)
    return call | {"previous": previous, "ratio": ratio, "return_velocity": True}


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("guided", [False, True])
def test_it_is_its_formula(guided, dtype):
    """By hand in float64."""
    call = with_history(boundary(dtype, guided))
    wide = {
        name: value.double() if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }
    x = torch.nn.functional.layer_norm(wide["x"], (72,), eps=1e-6)
    x = x * (1 + wide["scale"] + wide["step_scale"]) + wide["shift"] + wide["step_shift"]
    v = x @ wide["weight"].T + wide["bias"]
    if guided:
        v = v[2:] + 1.5 * (v[:2] - v[2:])
    state = wide["state"] + 0.125 * (1.35 * v - 0.35 * wide["previous"])
    embedded = state @ wide["embed_weight"].T + wide["embed_bias"] + wide["positions"]
    found = reference.flow_boundary(**wide)
    torch.testing.assert_close(found[0], state)
    torch.testing.assert_close(found[1], torch.cat([embedded] * (1 + guided)))
    torch.testing.assert_close(found[2], v)
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
        ("dt", lambda c: torch.tensor(1.0, device="meta")),
        ("dt", lambda c: torch.tensor(1.0, requires_grad=True)),
        ("ratio", lambda c: torch.tensor(1.0).half()),
        ("ratio", lambda c: torch.ones(2)),
        ("previous", lambda c: c["previous"][:1]),
        ("previous", lambda c: c["previous"].double()),
        ("eps", lambda c: 0.0),
    ],
)
def test_what_it_refuses(name, change):
    call = with_history(boundary())
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
    *_, velocity = cuda.flow_boundary(**call, return_velocity=True)
    assert velocity.shape == state.shape and velocity.dtype == state.dtype
    assert state.shape == call["state"].shape and embedded.shape == call["x"].shape


def kernel(dtype=torch.float32):
    return resolve("flow_boundary", device="cpu", dtype=dtype, backend="cpp")


def in_place(call):
    """The outputs of `flow_boundary_out`, written over copies of the state, of x and, where there
    is one, of the velocity before."""
    from ecar_kernels.flow_boundary.cpp import flow_boundary_out

    x, state = call["x"].clone(), call["state"].contiguous().clone()
    before = call.get("previous")
    velocity = state.clone() if before is None else before.contiguous().clone()
    names = ("shift", "scale", "weight", "bias", "embed_weight", "embed_bias", "positions", "dt")
    flow_boundary_out(
        x,
        state,
        *(call[name] for name in names),
        *(call.get(name) for name in OPTIONAL),
        call["guidance_scale"],
        call.get("ratio", 0.0),
        1e-6,
        state,
        x,
        None if before is None else velocity,
        velocity,
    )
    return state, x, velocity


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
    if draw(st.booleans()):
        call = with_history(call, draw(st.sampled_from([0.0, 0.4, 1.0, 2.5])))
        if draw(st.booleans()):
            room = torch.randn(len(call["state"]), 2 * kinds["tokens"], kinds["outputs"] + 3)
            call["previous"] = room.to(call["state"].dtype)[:, ::2, 1:-2]
        call["return_velocity"] = draw(st.booleans())
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
    """From an embedding's weight that lies turned in memory, too."""
    expected = kernel()(**call | {"return_velocity": True})
    turned = call | {"embed_weight": call["embed_weight"].T.contiguous().T}
    for layout in (call, turned):
        assert all(map(Tensor.equal, in_place(layout), expected))


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_it_is_the_ops_of_an_image(dtype):
    """The velocity that it leaves, through euler_step, is its state: bit for bit."""
    call = with_history(boundary(dtype))
    call["state"], call["previous"] = call["state"].float(), call["previous"].float()
    state, _, v = kernel(dtype)(**call)
    images = [x.unflatten(1, (4, 4)) for x in (call["state"], v, call["previous"])]
    step = resolve("euler_step", device="cpu", dtype=torch.float32, backend="cpp")
    x, velocity, previous = images
    assert step(x, velocity, 0.125, previous=previous, ratio=0.7).equal(state.unflatten(1, (4, 4)))


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_an_image_is_the_same_bits_in_every_batch_and_on_any_number_of_threads(dtype):
    call = with_history(boundary(dtype, batch=5, tokens=67, channels=130))
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
        own = {name: call[name][image : image + 1] for name in ("state", "previous")}
        state, embedded, velocity = kernel()(**alone | own)
        assert state[0].equal(results[0][0][image])
        assert velocity[0].equal(results[0][2][image])
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
    call = with_history(boundary())
    out = torch.empty_like(call["state"]), torch.empty_like(call["x"])
    history = call["previous"], torch.empty_like(call["state"])
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
        0.7,
        1e-6,
        *out,
        *history,
    )


@needs_native
def test_opcheck():
    kernel()  # its fakes
    arguments = out_arguments()
    torch.library.opcheck(torch.ops.ecar.flow_boundary_out.default, arguments)
    data = (torch.tensor(0.5),) * 3
    for op in (torch.ops.ecar.flow_boundary, torch.ops.ecar.flow_boundary_velocity):
        for options in ((), arguments[17:18], (*arguments[17:18], *data)):
            torch.library.opcheck(op.default, (*arguments[:15], *options))


@needs_native
@torch.no_grad()
def test_inductor_equals_eager():
    torch._dynamo.reset()
    for guided in (False, True):
        call = boundary(guided=guided)
        call = with_history(call) if guided else call
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
        (6, lambda a: a[6].T, "'embed_weight': expected"),
        (6, lambda a: a[6][:-1].T.contiguous().T, "'embed_weight': expected"),
        (6, lambda a: a[6].half().T.contiguous().T, "'embed_weight': expected"),
        (15, lambda a: a[15][:, :-1], "'new_state': expected"),
        (
            15,
            lambda a: torch.empty(2, 16, 32)[..., :16],
            "'new_state': expected a contiguous tensor",
        ),
        (16, lambda a: a[16].half(), "'embedded': expected the first argument's type"),
        (16, lambda a: a[0].flatten()[4:], "'embedded': expected"),
        (17, lambda a: a[17][:1], "'previous': expected"),
        (17, lambda a: a[17].half(), "'previous': expected"),
        (18, lambda a: a[18][:1], "'velocity_out': expected"),
        (18, lambda a: a[18].half(), "'velocity_out': expected"),
        (18, lambda a: a[1], "'velocity_out': expected memory apart"),
        (15, lambda a: a[17], "'new_state': expected memory apart"),
        (15, lambda a: a[18], "'velocity_out': expected memory apart"),
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
    arguments[16] = room[8:].view(4, 16, 72)
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
        for its in (call, with_history(call)):
            assert_accurate(cuda, reference.flow_boundary, its)

    def test_a_graph_replays_with_other_numbers(self):
        names = ("dt", "guidance_scale", "ratio")
        call = with_history(boundary(device="cuda"))
        call |= {name: torch.tensor(call[name], device="cuda") for name in names}
        flow_boundary(**call)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), use_backend("cuda"):
            results = flow_boundary(**call)
        others = dict(zip(names, (0.25, 3.0, 1.25), strict=True))
        for name, value in others.items():
            call[name].fill_(value)
        graph.replay()
        with use_backend("cuda"):
            expected = flow_boundary(**call | others)
        assert all(map(Tensor.equal, results, expected))

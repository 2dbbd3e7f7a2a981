"""The flow step: the references against the formulas, and C++ and CUDA C++ against them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ecar_kernels import _native, euler_step, use_backend
from ecar_kernels.flow_step import reference
from ecar_kernels.registry import KERNEL_DTYPES, resolve
from tests.support.accuracy import assert_accurate, error, largest_error, run, tensors, ulp
from tests.support.backends import on_gpu
from tests.support.native import needs_native
from tests.support.ops import arguments

REASON = _native.why_not_cuda()
gpu = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
OPS = ("euler_step", "upsample_renoise_euler")
CLOSE = {"rtol": 1e-13, "atol": 1e-13}


def up(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


def down(x):
    return F.avg_pool2d(x, 2)


def test_euler_step_is_its_formula():
    call = arguments("euler_step", dtype=torch.float64)
    conditional, unconditional = call["velocity"][:2], call["velocity"][2:]
    guided = unconditional + 1.5 * (conditional - unconditional)
    found, v = reference.euler_step(**call)  # of a ratio of 0.5
    slope = 1.25 * guided - 0.25 * call["previous"]
    torch.testing.assert_close(found, call["x"] + 0.125 * slope, **CLOSE)
    torch.testing.assert_close(v, guided, **CLOSE)
    plain, v = reference.euler_step(call["x"], conditional, 0.125, return_velocity=True)
    torch.testing.assert_close(plain, call["x"] + 0.125 * conditional, **CLOSE)
    assert v.equal(conditional) and v.data_ptr() != conditional.data_ptr()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_guidance_1_is_the_conditional_velocity(dtype):
    call = arguments("euler_step", dtype=dtype, optional=False) | {"guidance_scale": 1.0}
    plain = euler_step(call["x"], call["velocity"][:2], call["dt"])
    assert largest_error(euler_step(**call), plain.double()) <= ulp(plain, dtype)


def test_upsample_renoise_is_an_euler_step_and_a_jump():
    call = arguments("upsample_renoise_euler", dtype=torch.float64)
    end, start, v = reference.upsample_renoise_euler(**call)
    step = {n: x for n, x in call.items() if n not in ("time", "stage", "details")}
    assert all(map(torch.equal, (end, v), reference.euler_step(**step)))
    high_pass = reference.haar_high_pass(call["details"])
    torch.testing.assert_close(start, 2 / 3 * up(end) + 2 / 3 * high_pass, **CLOSE)


def test_seeds_draw_the_details_of_the_stage_that_begins():
    call = arguments("upsample_renoise_euler", optional=False)
    for stage in (2, 3, 7):
        details = reference.block_details(call["seeds"], stage, call["x"].shape[1:])
        drawn = reference.upsample_renoise_euler(**call | {"stage": stage})
        given = reference.upsample_renoise_euler(**call | {"seeds": None, "details": details})
        assert all(a.equal(b) for a, b in zip(drawn, given, strict=True))


def test_the_transition_identity():
    """A stage's end state jumps onto the next stage's start state, exactly (design: 3.3).

    Latents and noise of one pyramid; the details are those of the finer noise.
    """
    fine = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    noise = torch.randn_like(fine)
    a, b, c, d = (noise[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
    details = torch.stack((a + b - c - d, a - b + c - d, a - b - c + d), dim=2) / 2
    for time in (1 / 3, 2 / 3, 0.5):
        end_time = 2 * time / (1 + time)
        end = end_time * down(fine) + (1 - end_time) * 2 * down(noise)
        velocity = torch.randn_like(end)
        x = end - 0.1 * velocity
        found_end, found_start = reference.upsample_renoise_euler(
            x, velocity, 0.1, time=time, stage=2, details=details
        )
        start = time * up(down(fine)) + (1 - time) * noise
        torch.testing.assert_close(found_end, end, **CLOSE)
        torch.testing.assert_close(found_start, start, **CLOSE)


def test_the_jump_s_noise_is_white():
    """From a state of pure noise, start's covariance is the identity; 6 standard errors."""
    images = 20_000
    x = torch.randn(images, 1, 2, 2, dtype=torch.float64)
    for time in (1 / 3, 2 / 3):
        end_time = 2 * time / (1 + time)
        _, start = reference.upsample_renoise_euler(
            x * (1 - end_time),
            torch.zeros_like(x),
            0.1,
            time=time,
            stage=2,
            seeds=torch.randint(-(2**63), 2**63 - 1, (images,)),
        )
        flat = start.flatten(1) / (1 - time)
        covariance = flat.T @ flat / images
        deviation = (covariance - torch.eye(16).double()) * images**0.5
        assert deviation.abs().max() < 6 * 2**0.5  # a square's variance is 2: 136 entries, p < 1e-6


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("op", ["euler_step", "upsample_renoise_euler"])
def test_arithmetic_is_in_float32(op, dtype):
    """In 16 bits the result is the float64 one, rounded once; in float32, to a few ulp."""
    call = arguments(op, batch=4, dtype=dtype)
    allowed = 4 if dtype == torch.float32 else 0.51
    results = run(getattr(reference, op), call)
    oracles = run(getattr(reference, op), call, torch.float64)
    for result, oracle in zip(results, oracles, strict=True):
        assert largest_error(result, oracle) <= allowed * ulp(oracle, dtype)


@pytest.mark.parametrize("op", ["euler_step", "upsample_renoise_euler"])
def test_an_image_does_not_depend_on_its_batch(op):
    call = arguments(op, batch=5, optional=False)
    whole = run(getattr(reference, op), call)
    rows = [3, 1]
    part = call | {"x": call["x"][rows], "velocity": call["velocity"][[*rows, 8, 6]]}
    if "seeds" in call:
        part["seeds"] = call["seeds"][rows]
    for all_of_them, some in zip(whole, run(getattr(reference, op), part), strict=True):
        assert some.equal(all_of_them[rows])


def test_integers_are_numbers_too():
    call = arguments("euler_step") | {"return_velocity": False}
    with use_backend("reference"):
        assert euler_step(**call | {"dt": 1, "guidance_scale": 2, "ratio": 1}).equal(
            euler_step(**call | {"dt": 1.0, "guidance_scale": 2.0, "ratio": 1.0})
        )


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_native)])
def test_steps_with_a_history_are_of_order_2(backend):
    """On dx/dt = (x + t) / 2, whose solution is known, with uneven steps; the first is Euler's."""
    x0, errors = torch.randn(1, 2, 4, 4), []
    exact = (x0.double() + 2) * math.exp(0.5) - 3
    for count in (8, 16, 32):
        times = [(i / count) ** 1.5 for i in range(count + 1)]
        x, history = x0, {}
        with use_backend(backend):
            for i, (t, after) in enumerate(itertools.pairwise(times)):
                dt = after - t
                if i > 0:
                    history["ratio"] = dt / (t - times[i - 1])
                x, history["previous"] = euler_step(
                    x, (x + t) / 2, dt, return_velocity=True, **history
                )
        errors.append((x - exact).abs().max().item())
    assert all(abs(math.log2(a / b) - 2) < 0.3 for a, b in itertools.pairwise(errors))


# C++ on the CPU.

LAYOUTS = ("contiguous", "channels first", "sliced", "expanded", "tall")
SEEDS = st.integers(-(2**63), 2**63 - 1)
KINDS = st.sampled_from(["plain", "guided"])


def cpp(op, dtype=torch.float32):
    return resolve(op, device="cpu", dtype=dtype, backend="cpp")


def images(shape, dtype, layout):
    """Random [B, .., h, w] in memory as asked."""
    batch, *middle, height, width = shape

    def normal(*sizes):
        return torch.randn(*sizes).to(dtype)

    if layout == "channels first":
        return normal(*middle[::-1], batch, height, width).permute(
            len(middle), *range(len(middle))[::-1], -2, -1
        )
    if layout == "sliced":
        return normal(batch + 1, *middle, height + 2, width + 3)[1:, ..., 1:-1, 2:-1]
    if layout == "expanded":
        return normal(1, *middle, 1, width).expand(*shape)
    if layout == "tall":
        return normal(batch, *middle, 2 * height, width)[..., ::2, :]
    return normal(*shape)


@st.composite
def calls(draw, op):
    shape = [draw(st.integers(*limits)) for limits in ((0, 3), (1, 4), (0, 9), (1, 41))]
    dtype = draw(st.sampled_from(KERNEL_DTYPES))
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in range(4)]
    guided = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**32)))
    call = {
        "x": images(shape, dtype, layouts[0]),
        "velocity": images([shape[0] * (1 + guided), *shape[1:]], dtype, layouts[1]),
        "dt": draw(st.sampled_from([1.0, 0.1, 1 / 83])),
        "guidance_scale": draw(st.sampled_from([1.0, 1.5, 4.0])) if guided else 1.0,
    }
    if draw(st.booleans()):
        call |= {
            "previous": images(shape, dtype, layouts[3]),
            "ratio": draw(st.sampled_from([0.0, 0.4, 1.0, 2.5])),
        }
    if draw(st.booleans()):
        call["return_velocity"] = True
    if op == "upsample_renoise_euler":
        call |= {
            "time": draw(st.sampled_from([0.0, 1 / 3, 2 / 3])),
            "stage": draw(st.integers(2, 5)),
        }
        if draw(st.booleans()):
            details = [shape[0], shape[1], 3, *shape[2:]]
            call["details"] = images(details, dtype, layouts[2])
        else:
            call["seeds"] = torch.randint(-(2**63), 2**63 - 1, (2 * shape[0],))[::2]
    return call


@needs_native
@pytest.mark.parametrize("op", OPS)
@given(st.data())
def test_outputs_and_gradients(op, data):
    call = data.draw(calls(op))
    with torch.no_grad():
        assert_accurate(cpp(op), getattr(reference, op), call)
    assert_accurate(cpp(op), getattr(reference, op), call, gradients=True)


@needs_native
@given(st.data())
def test_an_euler_step_has_the_bits_of_the_reference(data):
    call = data.draw(calls("euler_step"))
    results = (tensors(step(**call)) for step in (cpp("euler_step"), reference.euler_step))
    assert all(itertools.starmap(torch.equal, zip(*results, strict=True)))


@needs_native
@pytest.mark.parametrize("name", ["euler_step", "upsample_renoise_euler_seeds"])
def test_a_wrong_history_of_the_op_itself_is_refused(name):
    cpp("euler_step")
    x = torch.randn(2, 3, 4, 5)
    more = (0.5, 2, torch.tensor([3, -4])) if "seeds" in name else ()
    for suffix in ("", "_velocity"):
        op = getattr(torch.ops.ecar, name + suffix)
        for options, message in (
            ({"previous": x[:1]}, r"'previous': expected \[2, 3, 4, 5\], got \[1, 3, 4, 5\]"),
            ({"previous": x.half()}, "'previous': expected the first argument's type"),
            ({"previous": x.mT.contiguous().mT}, "'previous': expected a contiguous last dim"),
            ({"dt_data": torch.ones(2)}, "'dt_data': expected one float32"),
            ({"guidance_data": torch.ones(()).half()}, "'guidance_data': expected one float32"),
            ({"ratio_data": torch.ones(()).double()}, "'ratio_data': expected one float32"),
        ):
            with pytest.raises(RuntimeError, match=f"argument {message}"):
                op(x, x, 0.1, 1.0, 0.5, *more, **options)


@needs_native
@given(
    st.lists(SEEDS, min_size=1, max_size=5),
    st.tuples(st.integers(1, 5), st.integers(1, 30), st.integers(1, 30)),
    st.sampled_from(KERNEL_DTYPES),
)
def test_the_same_seeds_give_the_reference_s_noise(seeds, shape, dtype):
    """To float rounding: an angle near a whole turn is rounded by 2^-22, a radius is below 7."""
    options = {"device": "cpu", "dtype": dtype}
    ours = cpp("initial_noise", dtype)(torch.tensor(seeds), shape, **options)
    plain = reference.initial_noise(torch.tensor(seeds), shape, **options)
    assert ours.shape == plain.shape and ours.dtype == dtype
    allowed = 2e-6 + torch.finfo(dtype).eps * plain.double().abs()
    assert ((ours.double() - plain.double()).abs() <= allowed).all()


@needs_native
def test_noise_is_as_accurate_as_the_reference():
    """Root mean square error against float64, and nowhere more than a few ulp."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (64,))
    ours, plain, oracle = (
        op(seeds, (4, 32, 32), device="cpu", dtype=dtype)
        for op, dtype in (
            (cpp("initial_noise"), torch.float32),
            (reference.initial_noise, torch.float32),
            (reference.initial_noise, torch.float64),
        )
    )
    assert error(ours, oracle) <= error(plain, oracle)
    relative = (ours.double() - oracle).abs() / oracle.abs().clamp(min=1e-2)
    assert relative.max() <= 64 * torch.finfo(torch.float32).eps


@needs_native
@pytest.mark.parametrize("stage", [2, 3, 2**31])
def test_a_jump_draws_the_reference_s_details(stage):
    """From a state of zero, start is half the noise: the details can be read off it."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (3,))
    zero = torch.zeros(3, 2, 5, 7)
    end, start = cpp("upsample_renoise_euler")(zero, zero, 0.5, time=0.0, stage=stage, seeds=seeds)
    expected = reference.haar_high_pass(
        reference.block_details(seeds, stage, (2, 5, 7), torch.float64)
    )
    assert not end.any()
    assert (start.double() - expected).abs().max() <= 4e-6


@needs_native
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_jump_into_given_tensors_has_the_same_bits_and_may_replace_x(dtype):
    from ecar_kernels.flow_step.cpp import jump_out

    x, velocity = torch.randn(2, 3, 4, 5).to(dtype), torch.randn(4, 3, 4, 5).to(dtype)
    seeds = torch.tensor([3, -4])
    expected = cpp("upsample_renoise_euler", dtype)(
        x, velocity, 0.1, time=0.5, stage=2, seeds=seeds, guidance_scale=1.5
    )
    start = torch.empty(2, 3, 8, 10, dtype=dtype)
    jump_out(x, velocity, 0.1, 1.5, 0.5, 2, seeds, x, start)
    assert x.equal(expected[0]) and start.equal(expected[1])
    for outputs, wrong in (
        ((x[:1], start), "end"),
        ((x, start[..., :-1]), "start"),
        ((x, start.double()), "start"),
    ):
        with pytest.raises(RuntimeError, match=f"argument '{wrong}': expected"):
            jump_out(x, velocity, 0.1, 1.5, 0.5, 2, seeds, *outputs)
    room = torch.zeros(2, 3, 8, 10, dtype=dtype)
    inside = room.view(-1)[: x.numel()].view(x.shape)
    with pytest.raises(RuntimeError, match="argument 'start': expected memory apart"):
        jump_out(inside, velocity, 0.1, 1.5, 0.5, 2, seeds, inside, room)


@needs_native
def test_a_guided_step_extrapolates():
    x, conditional, unconditional = torch.randn(3, 2, 4, 8, 8)
    velocity = torch.cat((conditional, unconditional))
    found = cpp("euler_step")(x, velocity, 0.25, guidance_scale=3.0)
    expected = x + 0.25 * (unconditional + 3 * (conditional - unconditional))
    torch.testing.assert_close(found, expected)
    assert math.isclose(found.std().item(), expected.std().item(), rel_tol=1e-5)


class TestOnTheGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
    @pytest.mark.parametrize("op", OPS)
    def test_accuracy(self, op, dtype):
        for optional in (True, False):
            call = on_gpu(arguments(op, dtype=dtype, optional=optional))
            cuda = resolve(op, device="cuda", dtype=dtype, backend="cuda")
            assert_accurate(cuda, getattr(reference, op), call)

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

    def test_wrong_devices_are_refused(self):
        call = on_gpu(arguments("euler_step"))
        with pytest.raises(RuntimeError, match="velocity"):
            torch.ops.ecar.euler_step(call["x"], call["velocity"].cpu(), 0.1, 1.5, 0.0)

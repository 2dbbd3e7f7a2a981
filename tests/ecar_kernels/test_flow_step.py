"""The flow step: the oracles against the formulas, guidance, and the jump between stages."""

import pytest
import torch
import torch.nn.functional as F

from ecar_kernels import euler_step, use_backend
from ecar_kernels.flow_step import reference
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.accuracy import largest_error, run, ulp
from tests.support.ops import arguments

CLOSE = {"rtol": 1e-13, "atol": 1e-13}


def up(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


def down(x):
    return F.avg_pool2d(x, 2)


def test_euler_step_is_its_formula():
    call = arguments("euler_step", dtype=torch.float64)
    conditional, unconditional = call["velocity"][:2], call["velocity"][2:]
    guided = unconditional + 1.5 * (conditional - unconditional)
    torch.testing.assert_close(reference.euler_step(**call), call["x"] + 0.125 * guided, **CLOSE)
    plain = reference.euler_step(call["x"], conditional, 0.125)
    torch.testing.assert_close(plain, call["x"] + 0.125 * conditional, **CLOSE)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_guidance_1_is_the_conditional_velocity(dtype):
    call = arguments("euler_step", dtype=dtype) | {"guidance_scale": 1.0}
    plain = euler_step(call["x"], call["velocity"][:2], call["dt"])
    assert largest_error(euler_step(**call), plain.double()) <= ulp(plain, dtype)


def test_upsample_renoise_is_an_euler_step_and_a_jump():
    call = arguments("upsample_renoise_euler", dtype=torch.float64)
    end, start = reference.upsample_renoise_euler(**call)
    step = {name: call[name] for name in ("x", "velocity", "dt", "guidance_scale")}
    assert end.equal(reference.euler_step(**step))
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
    call = arguments("euler_step")
    with use_backend("reference"):
        assert euler_step(**call | {"dt": 1, "guidance_scale": 2}).equal(
            euler_step(**call | {"dt": 1.0, "guidance_scale": 2.0})
        )

"""Sections 3.1 to 3.3 of the design, in float64."""

import math
from statistics import NormalDist

import pytest
import torch

from ecar import stages
from ecar_kernels import initial_noise
from ecar_kernels.flow_step.reference import block_details, haar_high_pass

EXACT = 1e-14  # float64 rounding of numbers of size 1 to 5


def normal(*shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_times_of_three_stages():
    assert [stages.start_time(s, 3) for s in (1, 2, 3)] == [0, 1 / 3, 2 / 3]
    assert [stages.end_time(s, 3) for s in (1, 2, 3)] == pytest.approx([1 / 2, 4 / 5, 1])
    tau = torch.tensor([0.0, 0.5, 1.0])
    assert stages.global_time(2, 3, tau).tolist() == pytest.approx([1 / 3, 1 / 2, 2 / 3])
    assert stages.start_time(1, 1) == 0
    assert stages.end_time(1, 1) == 1


@pytest.mark.parametrize("num_stages", [2, 3, 4, 5])
def test_transition_identity(num_stages, generator):
    """start_{s+1} = (1 + t)/2 up(end_s) + (1 - t) h_{s+1}, exact to rounding."""
    side = 2 ** (num_stages + 1)
    data = normal(2, 3, side, side, generator=generator)
    noise = normal(2, 3, side, side, generator=generator)
    points = stages.end_points(data, noise, num_stages)
    noises = stages.noise_pyramid(noise, num_stages)
    for stage in range(1, num_stages):
        following = noises[stage]
        high_pass = following - stages.up(stages.down(following))
        jumped = stages.transition(
            points[stage - 1][1], stages.start_time(stage + 1, num_stages), high_pass
        )
        assert (jumped - points[stage][0]).abs().max() < EXACT


def test_end_points_meet_the_data_and_the_noise(generator):
    data, noise = (normal(2, 1, 16, 16, generator=generator) for _ in range(2))
    points = stages.end_points(data, noise, 3)
    noises = stages.noise_pyramid(noise, 3)
    assert torch.equal(points[0][0], noises[0])
    assert torch.equal(points[-1][1], data)
    start, end = points[1]
    half = torch.full((2,), 0.25, dtype=torch.float64)
    expected = 0.75 * start + 0.25 * end
    assert (stages.interpolate(start, end, half) - expected).abs().max() < EXACT


def test_the_high_pass_has_no_low_pass_and_inverts(generator):
    details = normal(2, 3, 3, 4, 4, generator=generator)
    high_pass = haar_high_pass(details)
    assert stages.down(high_pass).abs().max() < EXACT
    # n_s = up(n_{s-1})/2 + h_s goes back to n_{s-1} by 2 down.
    coarse = normal(2, 3, 4, 4, generator=generator)
    fine = stages.up(coarse) / 2 + high_pass
    assert (2 * stages.down(fine) - coarse).abs().max() < EXACT


def test_start_noise_of_a_stage_has_identity_covariance(seed):
    """The sampler's noise at stage 3, built up by the jumps: N(0, I), at confidence 1 - 1e-6.

    An entry of the sample covariance of n draws has mean 0 (1 on the diagonal) and variance
    1/n (2/n); a union bound over all entries gives the threshold.
    """
    images, side = 20_000, 2
    seeds = torch.arange(images) + seed
    noise = initial_noise(seeds, (1, side, side), device="cpu", dtype=torch.float32)
    for stage in (2, 3):
        shape = (1, side * 2 ** (stage - 2), side * 2 ** (stage - 2))
        noise = stages.up(noise) / 2 + haar_high_pass(block_details(seeds, stage, shape))
    flat = noise.flatten(1).double()
    covariance = flat.T @ flat / images
    size = flat.shape[1]
    deviation = torch.full((size, size), math.sqrt(1 / images), dtype=torch.float64)
    deviation.fill_diagonal_(math.sqrt(2 / images))
    z = (covariance - torch.eye(size)) / deviation
    entries = size * (size + 1) // 2
    assert z.abs().max() < NormalDist().inv_cdf(1 - 1e-6 / (2 * entries))


def test_training_noise_is_white_at_every_stage(generator):
    """2 down(n) of white noise is white: the variance of each level, at confidence 1 - 1e-6."""
    noise = normal(256, 1, 32, 32, generator=generator)
    for level in stages.noise_pyramid(noise, 3):
        count = level.numel()
        z = (level.square().mean() - 1) / math.sqrt(2 / count)
        assert abs(z) < NormalDist().inv_cdf(1 - 1e-6 / 6)

"""The noise of an image: Philox's known answers, the normals, and the layout of the streams."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ecar_kernels import initial_noise
from ecar_kernels.flow_step import reference
from ecar_kernels.flow_step.reference import (
    block_details,
    haar_high_pass,
    normals,
    philox4x32_10,
    uniforms,
)
from ecar_kernels.registry import KERNEL_DTYPES, resolve
from tests.support.native import needs_native

SEEDS = st.integers(-(2**63), 2**63 - 1)
KNOWN_ANSWERS = [  # Random123, kat_vectors
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> torch.Tensor:
    return torch.tensor([int(word, 16) for word in text.split()])


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = q >> 32 ^ b ^ k0, q % 2**32, p >> 32 ^ d ^ k1, p % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def normals_by_hand(four: list[int]) -> list[float]:
    """Box-Muller in float64 from u in float32."""
    u = [float((np.float32(word) + np.float32(0.5)) * np.float32(2**-32)) for word in four]
    return [
        math.sqrt(-2 * math.log(u[i])) * turn(2 * math.pi * u[i + 1])
        for i in (0, 2)
        for turn in (math.cos, math.sin)
    ]


def call_by_hand(seed: int, stage: int, call: int) -> list[float]:
    key = seed % 2**64
    return normals_by_hand(philox_by_hand([call, stage, 0, 0], [key % 2**32, key >> 32]))


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert philox4x32_10(words(counter), words(key)).equal(words(expected))
    by_hand = philox_by_hand(words(counter).tolist(), words(key).tolist())
    assert by_hand == words(expected).tolist()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_philox_in_int64_is_philox_in_unbounded_integers(six):
    found = philox4x32_10(torch.tensor(six[:4]), torch.tensor(six[4:]))
    assert found.tolist() == philox_by_hand(six[:4], six[4:])


def test_philox_broadcasts_counters_against_keys():
    counter, key = torch.randint(2**32, (5, 1, 4)), torch.randint(2**32, (3, 2))
    found = philox4x32_10(counter, key)
    assert found.shape == (5, 3, 4)
    assert found[4, 1].equal(philox4x32_10(counter[4, 0], key[1]))


def test_uniforms_are_never_zero_and_round_as_float32_does():
    edges = [
        0,
        1,
        2**23 - 1,
        2**23,
        2**23 + 1,
        2**24 + 1,
        2**31 + 128,
        2**31 + 384,
        2**32 - 129,
        2**32 - 128,
        2**32 - 1,
    ]
    u = uniforms(torch.tensor(edges))
    expected = [(np.float32(word) + np.float32(0.5)) * np.float32(2**-32) for word in edges]
    assert u.dtype == torch.float32
    assert u.tolist() == [float(x) for x in expected]
    assert u.min() > 0 and u.max() == 1
    assert normals(torch.tensor([[2**32 - 1, 0, 0, 0]])).isfinite().all()


@given(SEEDS, st.integers(1, 10), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
@example(-1, 1, 1, 1, 1)
@example(2**32, 2, 1, 1, 3)
@example(-(2**63), 3, 3, 5, 5)
def test_each_element_comes_from_its_own_counter(seed, stage, channels, height, width):
    """Calls by hand: key, counter, order of elements, sizes not a multiple of four."""
    shape = (channels, height, width)
    count = math.prod(shape)
    seeds = torch.tensor([seed])
    noise = initial_noise(seeds, shape, device="cpu", dtype=torch.float32)
    expected = torch.tensor([call_by_hand(seed, 1, i // 4)[i % 4] for i in range(count)])
    assert noise.shape == (1, *shape) and noise.dtype == torch.float32 and noise.is_contiguous()
    torch.testing.assert_close(noise.flatten(), expected, rtol=2e-6, atol=2e-6)

    details = block_details(seeds, stage, shape)
    expected = torch.tensor([call_by_hand(seed, stage, i)[:3] for i in range(count)])
    found = details.transpose(1, 2).reshape(3, count).T
    assert details.shape == (1, channels, 3, height, width) and details.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@given(
    st.lists(SEEDS, min_size=1, max_size=9), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)
)
def test_noise_belongs_to_the_image(seeds, channels, height, width):
    """The same seed gives the same bits alone and at any place in any batch."""
    shape = (channels, height, width)
    batch = initial_noise(torch.tensor(seeds), shape, device="cpu", dtype=torch.float32)
    details = block_details(torch.tensor(seeds), 2, shape)
    for place, seed in enumerate(seeds):
        alone = initial_noise(torch.tensor([seed]), shape, device="cpu", dtype=torch.float32)
        assert alone[0].equal(batch[place])
        assert block_details(torch.tensor([seed]), 2, shape)[0].equal(details[place])


def test_seeds_and_stages_have_streams_of_their_own():
    seeds = torch.tensor([0, 1, -1, 2**32, 2**33, -(2**63)])
    streams = [initial_noise(seeds, (4, 8, 8), device="cpu", dtype=torch.float32).flatten(1)]
    streams += [block_details(seeds, stage, (4, 8, 8)).flatten(1)[:, :256] for stage in (2, 3)]
    every = torch.cat(streams)
    correlation = torch.corrcoef(every) - torch.eye(len(every))
    assert correlation.abs().max() < 6 / math.sqrt(256)  # 6 sigma; 153 pairs: p < 1e-6


def test_normals_are_standard_and_independent():
    """Each statistic is within 6 standard errors: a false alarm in 1e7 runs of this test."""
    count = 400_000
    z = normals(torch.randint(2**32, (count, 4))).double()

    def standard_errors(mean: torch.Tensor, expected: float, variance: float) -> float:
        return ((mean - expected).abs().max() * math.sqrt(count / variance)).item()

    assert standard_errors(z.mean(0), 0, 1) < 6
    assert standard_errors(z.square().mean(0), 1, 2) < 6
    assert standard_errors(z.pow(3).mean(0), 0, 15) < 6
    assert standard_errors(z.pow(4).mean(0), 3, 96) < 6
    products = torch.stack([z[:, i] * z[:, j] for i in range(4) for j in range(i)])
    assert standard_errors(products.mean(1), 0, 1) < 6
    squares = torch.stack([z[:, i] ** 2 * z[:, j] ** 2 for i in range(4) for j in range(i)])
    assert standard_errors(squares.mean(1), 1, 8) < 6
    # Kolmogorov-Smirnov over all: p = 2 exp(-2 * 2.9^2) < 1e-7.
    ordered = z.flatten().sort().values
    rank = torch.arange(1, len(ordered) + 1) / len(ordered)
    distribution = torch.special.ndtr(ordered)
    assert (distribution - rank).abs().max() * math.sqrt(len(ordered)) < 2.9


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_other_types_are_the_float32_noise_rounded(dtype):
    seeds = torch.tensor([7, -7])
    noise = initial_noise(seeds, (3, 5, 5), device="cpu", dtype=torch.float32)
    assert initial_noise(seeds, (3, 5, 5), device="cpu", dtype=dtype).equal(noise.to(dtype))


def test_haar_covariance_is_identity_minus_a_quarter():
    """Exactly: the columns are the blocks of unit details."""
    details = torch.eye(3, dtype=torch.float64).reshape(3, 1, 3, 1, 1)
    columns = haar_high_pass(details).reshape(3, 4).T
    assert (columns @ columns.T).equal(torch.eye(4).double() - 0.25)
    assert columns.T.tolist() == [
        [0.5, 0.5, -0.5, -0.5],
        [0.5, -0.5, 0.5, -0.5],
        [0.5, -0.5, -0.5, 0.5],
    ]


def test_haar_high_pass_is_a_noise_less_its_block_means():
    noise = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    blocks = noise.unflatten(3, (6, 2)).unflatten(2, (4, 2))  # [B, C, h, 2, w, 2]
    a, b, c, d = blocks.movedim(3, 4).flatten(4).unbind(-1)
    details = torch.stack((a + b - c - d, a - b + c - d, a - b - c + d), dim=2) / 2
    means = torch.nn.functional.avg_pool2d(noise, 2)
    expected = noise - torch.nn.functional.interpolate(means, scale_factor=2)
    torch.testing.assert_close(haar_high_pass(details), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.gpu
def test_a_gpu_draws_the_same_noise():
    seeds = torch.randint(-(2**63), 2**63 - 1, (64,))
    here = initial_noise(seeds, (4, 8, 8), device="cpu", dtype=torch.float32)
    there = initial_noise(seeds, (4, 8, 8), device="cuda", dtype=torch.float32)
    torch.testing.assert_close(there.cpu(), here, rtol=2e-6, atol=2e-6)


# C++ on the CPU.


def cpp_noise():
    return resolve("initial_noise", device="cpu", dtype=torch.float32, backend="cpp")


@needs_native
def test_edge_words_through_the_vector_functions():
    """The smallest and largest uniforms, and every quarter turn, by seeds found with Philox."""
    wanted = {(word, edge): None for word in range(4) for edge in ("low", "high")}
    seeds = torch.arange(1 << 16)
    key = torch.stack((seeds, torch.zeros_like(seeds)), -1)
    words = reference.philox4x32_10(torch.tensor([0, 1, 0, 0]), key)
    for word, edge in wanted:
        column = words[:, word]
        wanted[word, edge] = (column.argmin() if edge == "low" else column.argmax()).item()
    quarter = (words[:, 1] - 2**30).abs().argmin().item()
    extremes = torch.tensor([*wanted.values(), quarter])
    noise = cpp_noise()(extremes, (1, 1, 4), device="cpu", dtype=torch.float32)
    oracle = reference.normals(words[extremes], torch.float64)
    assert noise.isfinite().all()
    assert (noise.flatten(1).double() - oracle).abs().max() <= 4e-6


@needs_native
def test_seeds_may_be_strided_and_noise_fills_whole_images():
    """Elements in the last partial call and block, for counts around their sizes."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (6,))[::3]
    for count in (1, 3, 4, 5, 63, 64, 65, 1023, 1024, 1025, 2051):
        ours = cpp_noise()(seeds, (1, 1, count), device="cpu", dtype=torch.float32)
        plain = reference.initial_noise(seeds, (1, 1, count), device="cpu", dtype=torch.float32)
        assert ours.shape == (2, 1, 1, count)
        assert (ours - plain).abs().max() <= 4e-6


@needs_native
def test_noise_of_no_image():
    noise = cpp_noise()(
        torch.zeros(0, dtype=torch.int64), (4, 8, 8), device="cpu", dtype=torch.float32
    )
    assert noise.shape == (0, 4, 8, 8)

"""How the fused GEMMs' launch settings are chosen, and the model of times behind it."""

import itertools
from dataclasses import replace

import pytest

from ecar_kernels._triton import SHARED_KIB
from ecar_kernels.flow_block import launch

H100 = {"itemsize": 2, "precision": "ieee", "sms": 132, "arch": 90}


@pytest.mark.parametrize("sms, arch", [(108, 80), (132, 90), (148, 100), (170, 120)])
@pytest.mark.parametrize("width", [768, 1024, 1152])
def test_default_is_the_fastest_by_the_model(width, sms, arch):
    kinds = ((4, "ieee"), (4, "tf32"), (2, "ieee"))
    for kind, rows in itertools.product(kinds, (1, 16, 32, 64, 256, 512, 8192)):
        for outputs, inputs, normalised in layers(width):
            problem = rows, outputs, inputs, *kind, sms
            its = launch.default(*problem, arch, normalised)
            found = launch.candidates(*problem, arch, normalised)
            assert its.prologue == (normalised and rows <= launch.PROLOGUE_ROWS)
            assert its in found
            assert its.block_m < 2 * max(rows, 16)
            assert launch.nanoseconds(its, *problem) == min(
                launch.nanoseconds(other, *problem)
                for other in found
                if other.prologue == its.prologue
            )


def test_an_images_products_normalise_in_their_loop():
    """Also the guided ones of 256 tokens, which are 512 rows; with more, before it."""
    for rows in (1, 32, 512, 513):
        assert launch.default(rows, 4608, 1152, **H100, normalised=True).prologue == (rows <= 512)
        assert not launch.default(rows, 4608, 1152, **H100).prologue


@pytest.mark.parametrize("kind", [(4, "ieee"), (4, "tf32"), (2, "ieee")], ids=str)
@pytest.mark.parametrize("prologue", [False, True])
def test_stages_fit_shared_memory(kind, prologue):
    """Also of chips that the compile gate has not: those with little have the same tiles."""
    for arch in (80, 86, 89, 90, 100, 103, 120, 121):
        found = launch.tiles(*kind, arch, prologue=prologue)
        for its in found:
            block = ((3 if prologue else 1) * its.block_m + its.block_n) * its.block_k * kind[0]
            assert its.num_stages >= 2
            assert its.num_stages * block <= 1024 * SHARED_KIB.get(arch, 99)
        if SHARED_KIB.get(arch, 99) == 99:
            assert found == launch.tiles(*kind, 120, prologue=prologue)


def layers(width):
    """Outputs and inputs of a block's products, and whether they normalise."""
    return (
        (3 * width, width, True),
        (width, width, False),
        (4 * width, width, True),
        (width, 4 * width, False),
    )


def test_the_model_of_times():
    """By hand, where each of its terms is the longest."""
    tile = launch.Settings(16, 32, 64, 4, 5)
    half, exact = (2, "ieee", 132), (4, "ieee", 132)

    def time(its, *problem):
        return pytest.approx(launch.nanoseconds(its, *problem))

    # 12 blocks, 4 of them under way; a second wave of programs.
    assert time(tile, 16, 768, 768, *half) == 12 * 700 / 4
    assert time(tile, 16, 133 * 32, 768, *half) == 2 * 12 * 700 / 4
    # A program's bytes, of 16 + 32 rows or with shift and scale; all programs'; the weight.
    deep = replace(tile, block_k=512)
    assert time(deep, 16, 768, 3072, *half) == 48 * 3072 * 2 / 100
    assert time(replace(deep, prologue=True), 16, 768, 3072, *half) == 80 * 3072 * 2 / 100
    normal = replace(deep, prologue=True)
    assert time(normal, 16, 132 * 32, 3072, *half) == 80 * 3072 * 2 / 45
    weight = 132 * 128 * 128 * 2
    assert time(replace(deep, block_n=128), 16, 132 * 128, 128, *half) == weight / 3000
    # Without a matrix unit.
    large = replace(deep, block_m=128, block_n=128)
    assert time(large, 128, 128, 3072, *exact) == 128 * 128 * 3072 / 250


def test_the_model_of_normalising_first():
    """By hand: a group's two blocks, its claim and count, and a question; or all bytes of x, shift,
    scale and the result. A launch of its own is nothing but bytes, or a load, and the launch."""
    its, how = launch.Settings(128, 128, 64, 8, 3), (768, 2, 132)
    moved = 4 * 768 * 2 / (132 * 45)

    def time(rows, **options):
        return pytest.approx(launch.normalising(its, rows, *how, **options))

    assert time(2048) == (2 + 2 + 1) * 700
    assert time(2 * 2112) == (2 * (2 + 2) + 1) * 700
    assert launch.normalising(replace(its, num_warps=32), 2048, *how) == pytest.approx(
        max(2048 * moved, 3 * 700) + 700
    )
    assert time(2048, launched=True) == 1500 + 2048 * moved
    assert time(64, launched=True) == 1500 + 700

"""The roofline's sums."""

import pytest

from benchmarks import roofline
from ecar import ECARConfig
from ecar.info import count_multiply_adds
from ecar_kernels.costs import Rates


@pytest.mark.parametrize("size", ["S", "B", "L", "digits", "mnist"])
def test_multiply_adds_are_the_samplers(size):
    config = ECARConfig.preset(size)
    found = roofline.Roofline(config, steps=25)
    for stage in count_multiply_adds(config, steps=25):
        assert found.ar(stage.stage).multiply_adds == stage.ar
        assert found.modulation(stage.stage).multiply_adds == stage.modulation
        assert found.step(stage.stage).multiply_adds * stage.steps == stage.flow


def test_weights_are_read_once_a_call():
    """A step of one block more reads its weights and modulation, and reads or writes the rows of
    four linear layers, of attention, and of two residual streams."""

    def step(blocks):
        config = ECARConfig.preset("S", flow_blocks=blocks)
        return roofline.Roofline(config, itemsize=4).step(3)

    d, tokens = 768, 256
    more = step(3) + step(2) * -1
    weights, modulation, rows = 12 * d * d + 9 * d, 6 * (tokens * d + d), 16 + 4 + 2
    assert more.bytes == 4 * (weights + modulation + rows * tokens * d)
    assert more.launches == 5


def test_a_batch_shares_its_weights():
    config = ECARConfig.preset("B")
    one, two, eight = (roofline.Roofline(config, batch=n, steps=30).total() for n in (1, 2, 8))
    weights = 2 * one.bytes - two.bytes  # what does not grow with the batch
    assert weights >= 2 * 30 * config.flow_blocks * 12 * config.width**2
    assert eight.bytes == weights + 8 * (one.bytes - weights)
    assert eight.multiply_adds == pytest.approx(8 * one.multiply_adds, rel=0.01)
    assert one.launches == eight.launches


def test_the_floor_is_the_longest_of_three():
    work = roofline.Work(bytes=1000, multiply_adds=4000, launches=7)
    found = roofline.floor(work, Rates(100.0, 1000.0), 0.5)
    assert (found.memory, found.arithmetic, found.launches) == (10.0, 4.0, 3.5)
    assert found.seconds == 10.0

"""The roofline's sums."""

import pytest

from benchmarks import roofline
from ecar import ECARConfig
from ecar.info import count_multiply_adds
from ecar_kernels.costs import Rates


@pytest.mark.parametrize("size", ["S", "B", "L", "digits", "mnist"])
def test_multiply_adds_are_the_samplers(size):
    config = ECARConfig.preset(size)
    parts = roofline.Roofline(config, steps=25).parts()
    counted = count_multiply_adds(config, steps=25)
    for part, name in (("AR", "ar"), ("modulation", "modulation"), ("flow", "flow")):
        assert parts[part].multiply_adds == sum(getattr(stage, name) for stage in counted)


def test_weights_are_read_once_a_call():
    """A step of one block more reads that block's weights more, and its modulation."""

    def step(blocks):
        config = ECARConfig.preset("S", flow_blocks=blocks)
        return roofline.Roofline(config, itemsize=4).step(3)

    d, tokens = 768, 256
    more = step(3) + step(2) * -1
    assert more.weights == 4 * (12 * d * d + 9 * d)
    assert more.modulation == 4 * 6 * (tokens * d + d)
    assert more.launches == 5


def test_guided_images_and_batches_share_their_weights():
    one = roofline.Roofline(ECARConfig.preset("B")).total()
    eight = roofline.Roofline(ECARConfig.preset("B"), batch=8).total()
    guided = roofline.Roofline(ECARConfig.preset("B"), guided=True).total()
    assert one.weights == pytest.approx(eight.weights, rel=1e-3)
    assert guided.multiply_adds == pytest.approx(2 * one.multiply_adds, rel=0.01)
    assert one.launches == eight.launches == guided.launches


def test_the_floor_is_the_longest_of_three():
    work = roofline.Work(
        weights=600, modulation=300, activations=100, multiply_adds=4000, launches=7
    )
    found = roofline.floor(work, Rates(100.0, 1000.0), 0.5)
    assert (found.memory, found.arithmetic, found.launches) == (10.0, 4.0, 3.5)
    assert found.seconds == 10.0

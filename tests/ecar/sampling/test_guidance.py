"""Guidance scales by stage and time, and how steps are split over stages."""

from ecar.sampling import Guidance, split_steps


def test_schedules_and_intervals():
    constant = Guidance(4.0)
    assert [constant.at(s, 3, 0.5) for s in (1, 2, 3)] == [4.0, 4.0, 4.0]
    linear = Guidance(4.0, "linear")
    assert [linear.at(s, 3, 0.5) for s in (1, 2, 3)] == [1.0, 2.5, 4.0]
    assert linear.at(1, 1, 0.5) == 4.0
    inside = Guidance(4.0, interval=(0.2, 0.6))
    assert [inside.at(1, 3, t) for t in (0.1, 0.2, 0.6, 0.7)] == [1.0, 4.0, 4.0, 1.0]


def test_split():
    assert split_steps(250, 3) == [84, 83, 83]
    assert split_steps(3, 3) == [1, 1, 1]
    assert split_steps([5, 1, 9], 3) == [5, 1, 9]

"""Guidance scales by stage and time, how steps are split over stages, and the paper's protocol."""

import pytest
import torch

from ecar.sampling import Guidance, guidance, split_steps
from ecar.sampling.guidance import DEFAULT_GRID, DEFAULT_SOLVER, geometric_split, plan_steps


def test_schedules_and_intervals():
    constant = Guidance(4.0)
    assert [constant.at(s, 3, 0.5) for s in (1, 2, 3)] == [4.0, 4.0, 4.0]
    linear = Guidance(4.0, "linear")
    assert [linear.at(s, 3, 0.5) for s in (1, 2, 3)] == [1.0, 2.5, 4.0]
    assert linear.at(1, 1, 0.5) == 4.0
    inside = Guidance(4.0, interval=(0.2, 0.6))
    assert [inside.at(1, 3, t) for t in (0.1, 0.2, 0.6, 0.7)] == [1.0, 4.0, 4.0, 1.0]


def test_a_number_is_split_in_the_default_ratio():
    assert split_steps(30, 3) == geometric_split(30, 3, guidance.DEFAULT_RATIO)
    assert split_steps(3, 3) == [1, 1, 1]
    assert split_steps([5, 1, 9], 3) == [5, 1, 9]
    assert split_steps("paper", 3) == [84, 83, 83]
    assert split_steps("paper", 1) == [250]


@pytest.mark.parametrize("ratio", [1.0, 0.8, 0.5, 0.1])
@pytest.mark.parametrize("stages", range(1, 6))
def test_a_split_uses_every_step_and_leaves_no_stage_without(stages, ratio):
    for steps in range(stages, 60):
        counts = geometric_split(steps, stages, ratio)
        assert sum(counts) == steps
        assert counts == sorted(counts, reverse=True)
        assert min(counts) >= 1


def test_a_split_is_as_near_its_ratio_as_whole_numbers_can_be():
    assert geometric_split(30, 3, 1.0) == [10, 10, 10]
    assert geometric_split(31, 3, 1.0) == [11, 10, 10]
    assert geometric_split(70, 3, 0.5) == [40, 20, 10]
    for ratio in (0.8, 0.65, 0.5):
        whole = sum(ratio**stage for stage in range(3))
        for stage, count in enumerate(geometric_split(30, 3, ratio)):
            assert abs(count - 30 * ratio**stage / whole) < 1


def test_what_is_not_said_is_the_default_and_papers_is_the_papers():
    assert plan_steps(6, None, None, 2) == ([3, 3], DEFAULT_SOLVER, DEFAULT_GRID)
    assert plan_steps(6, "heun", 2, 2) == ([3, 3], "heun", 2.0)
    papers = ([125, 125], "euler", 1.0)
    assert plan_steps("paper", None, None, 2) == papers
    assert plan_steps("paper", "euler", 1, 2) == papers


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (("paper", "ab2", None), ValueError, "'solver': expected 'euler' or none .*got 'ab2'"),
        (("paper", None, 1.5), ValueError, r"'grid': expected 1.0 or none .*got 1.5"),
        (("papers", None, None), ValueError, "'steps': expected an integer, .*got 'papers'"),
        ((b"paper", None, None), TypeError, "'steps': expected an integer, .*got b'paper'"),
        ((6, "rk4", None), ValueError, "'solver': expected one of .*got 'rk4'"),
        ((6, None, "1.5"), TypeError, "'grid': expected a positive exponent"),
        ((torch.tensor(6), None, None), TypeError, "'steps': expected an integer, .*got a tensor"),
    ],
)
def test_what_cannot_be_is_named(given, error, message):
    with pytest.raises(error, match=f"argument {message}"):
        plan_steps(*given, 2)

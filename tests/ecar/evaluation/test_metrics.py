"""Fréchet distance, Inception Score, precision and recall: known values, and torchmetrics'."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecar.evaluation import (
    feature_statistics,
    frechet_distance,
    frechet_distance_of_features,
    inception_score,
    precision_recall,
)
from ecar.evaluation.metrics import _radii

F64 = torch.float64


def orthogonal(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=F64)).Q


def covariance(size, rank=None):
    factor = torch.randn(rank or 2 * size, size, dtype=F64)
    return factor.T @ factor / len(factor)


# Fréchet distance


@pytest.mark.parametrize("size", [4, 16, 64])
def test_frechet_of_sets_that_vary_in_different_directions(size):
    """The product of their covariances is zero, but for rounding."""
    axes = orthogonal(size)
    first, second = torch.zeros(2, 3 * size, size, dtype=F64)
    first[:, : size // 2] = torch.randn(3 * size, size // 2, dtype=F64)
    second[:, size // 2 :] = torch.randn(3 * size, size - size // 2, dtype=F64)
    got = frechet_distance_of_features(first @ axes, second @ axes)
    means = (first.mean(0) - second.mean(0)).square().sum()
    expected = means + first.var(0).sum() + second.var(0).sum()
    assert got == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_frechet_of_commuting_gaussians(size):
    """Covariances with common axes: |m1 - m2|^2 + sum (s1 - s2)^2, s the standard deviations."""
    axes = orthogonal(size)
    s1, s2 = torch.rand(2, size, dtype=F64) * 3
    m1, m2 = torch.randn(2, size, dtype=F64)
    got = frechet_distance(m1, axes * s1**2 @ axes.T, m2, axes * s2**2 @ axes.T)
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert got == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_of_two_by_two_gaussians_that_do_not_commute():
    """For 2 x 2, tr (XY)^(1/2) = sqrt(tr XY + 2 sqrt(det XY))."""
    x, y = covariance(2), covariance(2)
    root = (torch.trace(x @ y) + 2 * torch.det(x @ y).sqrt()).sqrt()
    expected = (x.trace() + y.trace() - 2 * root).item()
    zero = torch.zeros(2, dtype=F64)
    assert frechet_distance(zero, x, zero, y) == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_frechet_of_singular_covariances(size, rank, seed):
    """Zero to itself, symmetric, and that of the common subspace whatever lies outside it."""
    torch.manual_seed(seed)
    rank = min(rank, size)
    x, y = covariance(size, rank), covariance(size, rank)
    m = torch.randn(size, dtype=F64)
    assert frechet_distance(m, x, m, x) <= 1e-7 * x.trace().item()
    there, back = frechet_distance(m, x, -m, y), frechet_distance(-m, y, m, x)
    assert there == pytest.approx(back, rel=1e-9)
    # Embedded in more dimensions, turned: the distance stays.
    axes = orthogonal(size + 5)[:, :size]
    wide = frechet_distance(axes @ m, axes @ x @ axes.T, -axes @ m, axes @ y @ axes.T)
    assert wide == pytest.approx(there, rel=1e-6, abs=1e-7 * (x.trace() + y.trace()).item())


def test_frechet_agrees_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Features(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return images.flatten(1)[:, :12]

    real, generated = torch.rand(400, 3, 4, 4) ** 2, torch.rand(300, 3, 4, 4)
    theirs = FrechetInceptionDistance(Features(), input_img_size=(3, 4, 4)).set_dtype(F64)
    theirs.update(real, real=True)
    theirs.update(generated, real=False)
    ours = frechet_distance_of_features(real.flatten(1)[:, :12], generated.flatten(1)[:, :12])
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_statistics_are_the_unbiased_ones():
    features = torch.randn(50, 6, dtype=F64) + 1e4
    mean, cov = feature_statistics(features)
    assert torch.allclose(mean, features.mean(0)) and torch.allclose(cov, torch.cov(features.T))


def test_frechet_of_samples_approaches_that_of_their_gaussians():
    """5,000 samples of 8 features, covariances 1 and 4: 8 (2 - 1)^2 + |m|^2 = 10, 5 sigma."""
    first = torch.randn(5000, 8, dtype=F64)
    second = 2 * torch.randn(5000, 8, dtype=F64)
    second[:, 0] += math.sqrt(2)
    # Deviation of |m1 - m2|^2 is 2 sqrt(2) sqrt(5 / 5000); of sum (s1 - s2)^2, from s's own
    # s / sqrt(2 * 5000), 2 sqrt(8 * 5 / 10000).
    sigma = math.hypot(2 * math.sqrt(2) * math.sqrt(1e-3), 2 * math.sqrt(4e-3))
    assert abs(frechet_distance_of_features(first, second) - 10) < 5 * sigma


def test_frechet_refuses_what_is_no_covariance():
    size, mean = 5, torch.zeros(5, dtype=F64)
    good = covariance(size)
    axes = orthogonal(size)
    indefinite = axes * torch.tensor([1, 1, 1, 1, -1e-3], dtype=F64) @ axes.T
    for bad, message in [
        (indefinite, "least eigenvalue is -0.001"),
        (torch.randn(size, size, dtype=F64), "not symmetric"),
        (torch.full((size, size), torch.nan), "NaN"),
        (covariance(4), r"expected a tensor \[5, 5\]"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            frechet_distance(mean, good, mean, bad)
        assert "'cov2'" in str(caught.value)
    with pytest.raises(ValueError, match="'mean2'"):
        frechet_distance(mean, good, torch.zeros(4), good)
    with pytest.raises(ValueError, match="at least 2 rows"):
        feature_statistics(torch.rand(1, 4))
    with pytest.raises(ValueError, match="NaN"):
        feature_statistics(torch.full((3, 4), torch.inf))


# Inception Score


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_inception_score_of_certain_and_balanced_classes(classes):
    probabilities = torch.eye(classes).repeat(3, 1)
    score, deviation = inception_score(probabilities, splits=1)
    assert score == pytest.approx(classes, rel=1e-12) and deviation == 0


def test_inception_score_of_one_distribution_is_one():
    score, deviation = inception_score(torch.rand(10).softmax(0).expand(200, 10), splits=10)
    assert score == pytest.approx(1, rel=1e-6) and deviation == pytest.approx(0, abs=1e-6)


def test_inception_score_of_splits():
    """Without shuffling, each split holds one class alone, and none says anything."""
    probabilities = torch.eye(4).repeat_interleave(25, 0)
    assert inception_score(probabilities, splits=4, seed=None)[0] == pytest.approx(1)
    assert inception_score(probabilities, splits=4)[0] > 3.5
    # Two unlike splits: mean and (population) deviation of 1 and 4.
    halves = torch.cat([torch.eye(4)[:1].expand(8, 4), torch.eye(4).repeat(2, 1)])
    mean, deviation = inception_score(halves, splits=2, seed=None)
    assert (mean, deviation) == (pytest.approx(2.5), pytest.approx(1.5))


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`", "ignore:std\\(\\):UserWarning")
def test_inception_score_agrees_with_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    logits = torch.randn(500, 10, dtype=F64) * 3
    theirs = InceptionScore(torch.nn.Identity(), splits=1)
    theirs.update(logits)
    ours, _ = inception_score(logits.softmax(1), splits=1)
    assert ours == pytest.approx(theirs.compute()[0].item(), rel=1e-9)


@pytest.mark.parametrize(
    ("probabilities", "splits", "name"),
    [
        (torch.rand(5), 1, "probabilities"),
        (torch.full((5, 4), 0.3), 1, "probabilities"),
        (torch.tensor([[1.5, -0.5]]), 1, "probabilities"),
        (torch.full((5, 4), torch.nan), 1, "probabilities"),
        (torch.full((5, 4), 0.25), 6, "splits"),
        (torch.full((5, 4), 0.25), 0, "splits"),
    ],
)
def test_inception_score_refuses(probabilities, splits, name):
    with pytest.raises(ValueError, match=f"argument '{name}'"):
        inception_score(probabilities, splits)


# Precision and recall


def test_identical_and_disjoint_sets():
    features = torch.randn(200, 8)
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features, features + 100) == (0, 0)


def test_a_subset_has_precision_and_a_collapsed_set_no_recall():
    # Two far clusters; only one of them is generated.
    real = torch.cat([torch.randn(100, 4), torch.randn(100, 4) + 100])
    precision, recall = precision_recall(real, real[:100])
    assert precision == 1 and recall == 0.5


def test_points_on_a_line_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    generated = torch.tensor([[3.5], [18.5], [-50.0], [30.0]])
    # k = 1. Real radii 1, 1, 1, 8: 3.5 lies in 10's ball, 18.5 does not (8.5): precision 1/4.
    # Generated radii 15, 11.5, 53.5, 11.5: 3.5 covers all of -11.5 .. 18.5: recall 1.
    assert precision_recall(real, generated, k=1) == (0.25, 1)


@given(
    st.integers(4, 60),
    st.integers(4, 60),
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_blocks_change_nothing(count, other, k, block, seed):
    torch.manual_seed(seed)
    real, generated = torch.randn(count, 5), torch.randn(other, 5) + 0.5
    distances = torch.cdist(
        real.double(), real.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    expected = distances.kthvalue(k + 1).values
    assert torch.allclose(_radii(real.double(), k, block).sqrt(), expected, rtol=1e-6, atol=1e-7)
    across = torch.cdist(generated.double(), real.double())
    precision = (across <= expected).any(1).double().mean().item()
    assert precision_recall(real, generated, k, block=block)[0] == precision
    assert precision_recall(generated, real, k, block=block)[1] == precision


def test_precision_recall_refuses():
    good = torch.randn(10, 4)
    for real, generated, k, name in [
        (good, torch.randn(10, 5), 3, "generated_features"),
        (good[:3], good, 3, "real_features"),
        (good, good[0], 3, "generated_features"),
        (good, torch.full((9, 4), torch.nan), 3, "generated_features"),
        (good, good, 0, "k"),
        (good, good, 1.5, "k"),
    ]:
        with pytest.raises(ValueError, match=f"argument '{name}'"):
            precision_recall(real, generated, k)

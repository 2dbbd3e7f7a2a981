"""Distances between sets of features, in float64: Fréchet, Inception Score, precision and recall.

They know feature vectors and probabilities, not images: any extractor will do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "feature_statistics",
    "frechet_distance",
    "frechet_distance_of_features",
    "inception_score",
    "precision_recall",
]

_RESIDUAL = 1e-9


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [F] and unbiased covariance [F, F] of features [N, F], N >= 2, in float64."""
    features = _checked_features("features", features, least=2)
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance_of_features(first: Tensor, second: Tensor) -> float:
    """Fréchet distance between the Gaussians fitted to features [N, F] and [M, F]."""
    return frechet_distance(*feature_statistics(first), *feature_statistics(second))


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) of means [F], covariances [F, F].

    No square root of the unsymmetric product is taken, whose eigenvalues may come out complex or
    not at all where a covariance is singular. With cov = A^T A,

        tr (cov1 cov2)^(1/2) = the sum of the singular values of A1 A2^T,

    where A comes from the symmetric eigendecomposition. Three residuals are checked: A^T A against
    cov, the sum of the squared singular values against tr(cov1 cov2), and the bound
    2 tr (cov1 cov2)^(1/2) <= tr cov1 + tr cov2.

    Raises:
        ValueError: shapes do not match; a covariance is not finite, not symmetric, or has a
            negative eigenvalue.
        FloatingPointError: a residual is too large for the result to be trusted.
    """
    mean1, mean2 = (_checked_mean(n, m) for n, m in (("mean1", mean1), ("mean2", mean2)))
    if mean1.shape != mean2.shape:
        raise ValueError(
            f"argument 'mean2': expected shape {list(mean1.shape)} as 'mean1', "
            f"got {list(mean2.shape)}"
        )
    cov1, cov2 = (
        _checked_covariance(n, c, len(mean1)) for n, c in (("cov1", cov1), ("cov2", cov2))
    )
    singular = torch.linalg.svdvals(_factor("cov1", cov1) @ _factor("cov2", cov2).T)
    product, traces = (cov1 * cov2).sum().item(), (cov1.trace() + cov2.trace()).item()
    residual = abs((singular**2).sum().item() - product)
    # Of sets that vary in different directions the product is nothing but rounding.
    norms = torch.linalg.norm(cov1).item() * torch.linalg.norm(cov2).item()
    rounding = 16 * len(mean1) * torch.finfo(torch.float64).eps * norms
    if not residual <= _RESIDUAL * product + rounding:
        raise FloatingPointError(
            f"matrix square root: its square misses the product's trace by {residual:.3g} "
            f"of {product:.3g}"
        )
    spread = traces - 2 * singular.sum().item()
    if spread < -_RESIDUAL * traces:
        raise FloatingPointError(
            f"matrix square root: its trace is {-spread / 2:.3g} above its bound {traces / 2:.3g}"
        )
    return ((mean1 - mean2) ** 2).sum().item() + max(spread, 0.0)


def _factor(name: str, covariance: Tensor) -> Tensor:
    """A with A^T A = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    factor = values.clamp(min=0).sqrt().unsqueeze(1) * vectors.T
    residual = torch.linalg.norm(factor.T @ factor - covariance).item()
    if not residual <= _RESIDUAL * torch.linalg.norm(covariance).item():
        raise ValueError(
            f"argument {name!r}: not a covariance, its least eigenvalue is {values[0].item():.3g} "
            f"and its greatest {values[-1].item():.3g}"
        )
    return factor


def inception_score(
    probabilities: Tensor, splits: int = 10, *, seed: int | None = 0
) -> tuple[float, float]:
    """exp of the mean divergence of p(class | image) from p(class): (mean, deviation) over splits.

    Args:
        probabilities: [N, K], rows sum to 1.
        splits: parts of (nearly) equal size, N >= splits.
        seed: images are shuffled by it before they are split, since samples often come sorted by
            class, and a split with few classes scores low. None keeps their order.
    """
    if not isinstance(probabilities, Tensor) or probabilities.dim() != 2:
        raise ValueError(f"argument 'probabilities': expected [N, K], got {_shape(probabilities)}")
    p = probabilities.detach().to("cpu", torch.float64)
    if not (p >= 0).all() or not ((p.sum(1) - 1).abs() <= 1e-4).all():
        raise ValueError("argument 'probabilities': expected rows >= 0 that sum to 1")
    if isinstance(splits, bool) or not isinstance(splits, int) or not 1 <= splits <= len(p):
        raise ValueError(f"argument 'splits': expected 1 to N = {len(p)}, got {splits!r}")
    if seed is not None:
        p = p[torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))]
    scores = []
    for part in p.tensor_split(splits):
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0))
        scores.append(math.exp(divergence.sum(1).mean().item()))
    values = torch.tensor(scores, dtype=torch.float64)
    return values.mean().item(), values.std(correction=0).item()


def precision_recall(
    real_features: Tensor, generated_features: Tensor, k: int = 3, *, block: int = 1000
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    Precision is the share of generated features that lie within the distance of some real one to
    its k-th nearest real neighbour; recall is the same with the roles exchanged. The paper takes
    as many of the one as of the other, since radii shrink as a set grows.

    Args:
        real_features, generated_features: [N, F] and [M, F], both more than k.
        block: rows compared at a time: memory is block x max(N, M) x 8 bytes.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"argument 'k': expected an integer of at least 1, got {k!r}")
    real = _checked_features("real_features", real_features, least=k + 1)
    generated = _checked_features("generated_features", generated_features, least=k + 1)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"argument 'generated_features': expected {real.shape[1]} features as the real ones, "
            f"got {generated.shape[1]}"
        )
    # Common centre: small norms make the expanded square distances accurate.
    centre = real.mean(0)
    real, generated = real - centre, generated - centre
    precision = _covered(generated, real, _radii(real, k, block), block)
    recall = _covered(real, generated, _radii(generated, k, block), block)
    return precision, recall


def _square_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a**2).sum(1, keepdim=True) + (b**2).sum(1) - 2 * a @ b.T


def _radii(features: Tensor, k: int, block: int) -> Tensor:
    """Square distance of each feature to its k-th nearest other one, [N]."""
    radii = []
    for start in range(0, len(features), block):
        distances = _square_distances(features[start : start + block], features)
        distances.diagonal(start).fill_(torch.inf)
        radii.append(distances.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)


def _covered(points: Tensor, centres: Tensor, radii: Tensor, block: int) -> float:
    """Share of points within the radius of any centre."""
    inside = [(_square_distances(part, centres) <= radii).any(1) for part in points.split(block)]
    return torch.cat(inside).double().mean().item()


def _shape(value: object) -> object:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _checked_features(name: str, features: Tensor, least: int) -> Tensor:
    if not isinstance(features, Tensor) or features.dim() != 2:
        raise ValueError(f"argument {name!r}: expected a tensor [N, F], got {_shape(features)}")
    if len(features) < least:
        raise ValueError(f"argument {name!r}: expected at least {least} rows, got {len(features)}")
    features = features.detach().to("cpu", torch.float64)
    if not features.isfinite().all():
        raise ValueError(f"argument {name!r}: holds NaN or infinity")
    return features


def _checked_mean(name: str, mean: Tensor) -> Tensor:
    if not isinstance(mean, Tensor) or mean.dim() != 1:
        raise ValueError(f"argument {name!r}: expected a tensor [F], got {_shape(mean)}")
    if not mean.isfinite().all():
        raise ValueError(f"argument {name!r}: holds NaN or infinity")
    return mean.detach().to("cpu", torch.float64)


def _checked_covariance(name: str, covariance: Tensor, features: int) -> Tensor:
    if not isinstance(covariance, Tensor) or covariance.shape != (features, features):
        raise ValueError(
            f"argument {name!r}: expected a tensor [{features}, {features}], "
            f"got {_shape(covariance)}"
        )
    covariance = covariance.detach().to("cpu", torch.float64)
    if not covariance.isfinite().all():
        raise ValueError(f"argument {name!r}: holds NaN or infinity")
    asymmetry = (covariance - covariance.T).abs().max().item()
    if asymmetry > 1e-6 * covariance.abs().max().item():
        raise ValueError(f"argument {name!r}: not symmetric, by up to {asymmetry:.3g}")
    return (covariance + covariance.T) / 2

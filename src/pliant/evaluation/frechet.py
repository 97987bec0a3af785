"""Fréchet distance between Gaussians fitted to features, and its infinite-sample extrapolation.

With Inception pool3 features this is the FID (Heusel et al. 2017, arXiv 1706.08500, eq. 6); with any other
features it is only called a Fréchet distance. All arithmetic is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import ConfigError, DataError, ShapeError
from pliant.evaluation.statistics import FeatureStatistics, require_same_space


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): squared 2-Wasserstein distance of the two Gaussians, >=
    0.

    The finite-sample value is biased upwards, more for small n: compare only at equal n, or extrapolate.
    Raises ShapeError/DataError for different feature spaces or fewer than two features.
    """
    require_same_space(a, b)
    if 1 in (a.n, b.n):
        raise DataError("a covariance needs at least two features; draw more samples")
    # tr (C1^(1/2) C2 C1^(1/2))^(1/2) is the sum of singular values of F1^T F2 for any factors C = F F^T. Singular
    # values are exact to 1e-16 of the largest; roots of eigenvalues of the product only to 1e-8.
    overlap = torch.linalg.svdvals(a.factor.T @ b.factor).sum()
    shift = (a.mean - b.mean).square().sum()
    return max(0.0, float(shift + a.cov.trace() + b.cov.trace() - 2 * overlap))


@dataclass(frozen=True)
class Extrapolation:
    """A line through finite-sample distances: distance(n) = value + slope / n."""

    value: float  # at n = infinity; can be slightly negative, it is an estimate
    slope: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]  # mean over subsets of each size


def stratified_order(n: int, groups: Tensor | None, generator: torch.Generator) -> Tensor:
    """A random order of 0..n-1, (n,) int64, in which every stretch holds the groups in their overall shares.

    groups: (n,) integers such as class labels, or None for a plain permutation.
    """
    order = torch.randperm(n, generator=generator)
    if groups is None:
        return order
    place = torch.empty(n, dtype=torch.float64)
    for group in groups.unique():
        members = order[groups[order] == group]
        size = len(members)
        place[members] = (torch.arange(size) + torch.rand(size, generator=generator, dtype=torch.float64)) / size
    return place.argsort()


def frechet_distance_unbiased(
    features: Tensor,
    reference: FeatureStatistics,
    groups: Tensor | None = None,
    seed: int = 0,
    points: int = 6,
    subsets: int = 8,
) -> Extrapolation:
    """Fréchet distance extrapolated to infinitely many samples ("FID-infinity", Chong & Forsyth 2020, arXiv
    1911.07023).

    features: (N, D) of the samples, N >= 4 D so that the leading bias c/n is what is seen; groups: (N,) class
    labels if the classes were balanced on purpose, so that subsets are balanced too. At `points` sizes between N /
    5 and N, evenly spaced in 1/n, about `subsets` subsets are drawn without replacement. Only the bias of the
    samples is removed; that of a finite reference stays, and is the same for every model. Raises DataError if
    there are too few features, ShapeError for groups of another length, ConfigError for fewer than two points or
    no subsets.
    """
    if points < 2 or subsets < 1:
        raise ConfigError(f"a line needs at least 2 points of at least 1 subset, got {points} and {subsets}")
    total, dim = features.shape[0], reference.dim
    if total < 4 * dim:
        raise DataError(f"extrapolation needs at least {4 * dim} samples for {dim}-dimensional features, got {total}")
    if groups is not None and groups.shape != (total,):
        raise ShapeError(f"expected one group per feature ({total}), got {tuple(groups.shape)}")
    generator = torch.Generator().manual_seed(seed)
    features = features.to("cpu", torch.float64)
    inverse = torch.linspace(1 / total, 1 / max(total // 5, 2 * dim), points, dtype=torch.float64)
    sizes = tuple(min(total, round(1 / float(v))) for v in inverse)
    distances = []
    for n in sizes:
        per_order = total // n
        orders = 1 if n == total else math.ceil(subsets / per_order)
        values = []
        for _ in range(orders):
            order = stratified_order(total, groups, generator)
            # Disjoint blocks; where they do not fill the order, its end was random as well.
            blocks = order[: per_order * n].split(n)
            values += [frechet_distance(FeatureStatistics.of(features[b]), reference) for b in blocks]
        distances.append(sum(values) / len(values))
    x = 1 / torch.tensor(sizes, dtype=torch.float64)
    y = torch.tensor(distances, dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return Extrapolation(float(y.mean() - slope * x.mean()), float(slope), sizes, tuple(distances))

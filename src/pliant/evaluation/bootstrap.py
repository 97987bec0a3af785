"""How far a Fréchet distance would move if other samples had been drawn: the bootstrap, by weights.

A resample is a vector of counts, not a copy of the features; means, covariances and matrix roots of all resamples are
computed together. 200 resamples of 1000 features of 32 numbers take a fraction of a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import ConfigError, DataError, ShapeError
from pliant.evaluation.frechet import frechet_distance
from pliant.evaluation.statistics import FeatureStatistics, covariance_factor

REPEATS = 200
AT_ONCE = 1 << 22
"""Numbers of stacked covariances held at a time."""


@dataclass(frozen=True)
class Interval:
    """A value with its standard error and a symmetric normal interval."""

    value: float
    standard_error: float
    low: float
    high: float


def resampled_counts(n: int, repeats: int, seed: int, groups: Tensor | None = None) -> Tensor:
    """(repeats, n) float64: how often each of n samples is in each resample of n; rows sum to n.

    groups: (n,) integers whose shares every resample keeps, such as classes that were balanced on purpose.
    """
    generator = torch.Generator().manual_seed(seed)
    members = [torch.arange(n)] if groups is None else [(groups == g).nonzero()[:, 0] for g in groups.unique()]
    counts = torch.zeros(repeats, n, dtype=torch.float64)
    for places in members:
        k = len(places)
        chosen = places[torch.randint(k, (repeats, k), generator=generator)]
        counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
    return counts


def resampled_distances(
    features: Tensor,
    reference: FeatureStatistics,
    repeats: int = REPEATS,
    seed: int = 0,
    groups: Tensor | None = None,
) -> Tensor:
    """(repeats,) float64: the Fréchet distance to `reference` of every resample of features (n, D).

    Two plans sampled with the same seeds, and resampled with the same `seed` and `groups`, are resampled alike: the
    spread of the difference of their distances is that of the comparison. Raises as `bootstrap_interval`.
    """
    if features.ndim != 2 or features.shape[1] != reference.dim:
        raise ShapeError(f"expected features (n, {reference.dim}) as the reference has, got {tuple(features.shape)}")
    if len(features) < 2:
        raise DataError("resampling needs at least two features; draw more samples")
    if groups is not None and groups.shape != features.shape[:1]:
        raise ShapeError(f"expected one group per feature ({len(features)}), got {tuple(groups.shape)}")
    n, dim = features.shape
    x = features.detach().to("cpu", torch.float64)
    centre = x.mean(0)
    x = x - centre  # E[x x^T] - mean mean^T loses no digits when the mean is small
    factor, shift = covariance_factor(reference.cov), centre - reference.mean
    found = []
    for counts in resampled_counts(n, repeats, seed, groups).split(max(1, AT_ONCE // (dim * dim + n))):
        mean = counts @ x / n
        second = torch.stack([(x * row[:, None]).T @ x for row in counts])
        cov = (second - n * mean[:, :, None] * mean[:, None, :]) / (n - 1)
        # Eigenvalues of F^T C F are those of C C_ref; to half the digits, which a spread does not notice.
        roots = torch.linalg.eigvalsh(factor.T @ cov @ factor).clamp(min=0).sqrt().sum(1)
        traces = cov.diagonal(dim1=1, dim2=2).sum(1) + reference.cov.trace()
        found.append((mean + shift).square().sum(1) + traces - 2 * roots)
    return torch.cat(found)


def bootstrap_interval(
    features: Tensor,
    reference: FeatureStatistics,
    level: float = 0.9,
    repeats: int = REPEATS,
    seed: int = 0,
    groups: Tensor | None = None,
) -> Interval:
    """The Fréchet distance of features (n, D) to `reference`, and its spread due to which samples were drawn.

    groups: (n,) classes if they were balanced on purpose: resampled one by one, their shares would vary too, and the
    spread be far too large (2 to 6 times on the digits). Resampling biases a Fréchet distance upwards once more, so
    percentiles of the resampled values would sit beside the estimate; their standard deviation is sound, and the
    interval is value +- z * deviation. With G groups it is widened by sqrt(n / (n - G)), since each group's own mean
    is among what is resampled.

    Raises ConfigError for fewer than 2 repeats or a level outside (0, 1), DataError without enough features,
    ShapeError for features of another length.
    """
    if repeats < 2 or not 0 < level < 1:
        raise ConfigError(f"expected repeats >= 2 and 0 < level < 1, got {repeats} and {level}")
    count, n = (1 if groups is None else len(groups.unique())), len(features)
    if n <= count:
        raise DataError(f"resampling {n} features in {count} groups says nothing; draw more samples or pass no groups")
    draws = resampled_distances(features, reference, repeats, seed, groups)
    value = frechet_distance(FeatureStatistics.of(features, reference.provenance), reference)
    return normal_interval(value, float(draws.std()) * (n / (n - count)) ** 0.5, level)


def normal_interval(value: float, error: float, level: float) -> Interval:
    """value +- z * error that a normal law covers with probability `level`."""
    reach = error * float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
    return Interval(value, error, value - reach, value + reach)


def student_interval(values: Sequence[float], level: float) -> Interval:
    """Mean of repeats with other seeds and Student's interval around it.  Raises DataError for a single value."""
    n = len(values)
    if n < 2:
        raise DataError("an interval over repeats needs at least two of them")
    mean = sum(values) / n
    error = (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5
    reach = student_quantile((1 + level) / 2, n - 1) * error
    return Interval(mean, error, mean - reach, mean + reach)


def student_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t distribution, 0.5 <= p < 1, by bisection of its distribution function.

    The tail beyond t is half the regularised incomplete beta function of freedom / (freedom + t^2) at (freedom / 2,
    1/2), which is a finite sum of cosines for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4).
    """

    def below(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        c, term = math.cos(angle) ** 2, 1.0
        first = 1 if freedom % 2 else 0
        terms = []
        for k in range(first, freedom - 1, 2):  # 1, then products of (k)/(k + 1) cos^2
            terms.append(term)
            term *= (k + 1) / (k + 2) * c
        if first:
            inside = 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * sum(terms))
        else:
            inside = math.sin(angle) * sum(terms)
        return 0.5 + inside / 2

    low, high = 0.0, 1.0
    while below(high) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < p else (low, middle)
    return low

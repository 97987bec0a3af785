"""How far a Fréchet distance would move if other samples had been drawn: the bootstrap, by weights.

Samples get weights 1 + s/2 and 1 - s/2 with random signs s that sum to zero (a balanced, mirrored bootstrap). Half the
difference of the two distances is the odd part, L(d) + 2 Q(e, d), for a disturbance d of the kind that drawing samples
makes and the e that was in fact made; half their sum, less the plain distance, is the even part, Q(d, d). L and Q are
first and second derivative of the distance at the law of the samples. Fresh samples vary by Var L + Var Q(d, d). Far
from the reference that is the odd part's variance. Near it L vanishes, and the odd part has too much: 4 Var Q(e, d),
on average twice the even part's variance. So var(odd) - var(even) is right in both cases. The usual bootstrap is
too wide by a factor of 2 near the reference, where good plans are (measured: docs/evaluation.md).

200 distances of 1000 features of 32 numbers take a fraction of a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import ConfigError, DataError, ShapeError
from pliant.evaluation.frechet import frechet_distance
from pliant.evaluation.statistics import FeatureStatistics

REPEATS = 200
STEP = 0.5
"""Of the weights: small enough for second order, large enough for rounding."""
AT_ONCE = 1 << 22
"""Numbers of stacked covariances held at a time."""


@dataclass(frozen=True)
class Interval:
    """A value with its standard error and a symmetric normal interval."""

    value: float
    standard_error: float
    low: float
    high: float


def half_signs(n: int, repeats: int, seed: int, groups: Tensor | None = None) -> Tensor:
    """(repeats, n) float64: signs of random halves; rows sum to zero, also within each group.

    Of an odd number one is 0 and the others a little larger, so that the mean's variance is that of n independent
    samples. groups: (n,) integers such as classes that were balanced on purpose; single members are pooled.
    """
    generator = torch.Generator().manual_seed(seed)
    members = [torch.arange(n)] if groups is None else [(groups == g).nonzero()[:, 0] for g in groups.unique()]
    single = [places for places in members if len(places) == 1]
    members = [places for places in members if len(places) > 1] + ([torch.cat(single)] if single else [])
    signs = torch.zeros(repeats, n, dtype=torch.float64)
    for places in members:
        k = len(places)
        half = torch.zeros(k, dtype=torch.float64)
        size = (k / (k - k % 2)) ** 0.5 if k > 1 else 0.0
        half[: k // 2], half[k // 2 : k // 2 * 2] = size, -size
        order = torch.rand(repeats, k, generator=generator).argsort(1)
        signs[:, places] = half[order]
    return signs


@dataclass(frozen=True, eq=False)
class Spread:
    """How a distance moves with its samples: odd and even parts over mirrored pairs of weights, float64 (pairs,) each.

    Spreads of two plans on the same seeds, with the same `seed` and `groups`, may be subtracted: what they share
    cancels, and the error is that of the difference.
    """

    odd: Tensor
    even: Tensor

    def __sub__(self, other: Spread) -> Spread:
        return Spread(self.odd - other.odd, self.even - other.even)

    @property
    def error(self) -> float:
        """Standard error of the distance."""
        odd, even = float(self.odd.var()), float(self.even.var())
        # Never less than the even part alone, which is there even where L vanishes.
        return max(odd - even, even) ** 0.5


def spread(
    features: Tensor,
    reference: FeatureStatistics,
    repeats: int = REPEATS,
    seed: int = 0,
    groups: Tensor | None = None,
) -> Spread:
    """The spread of the Fréchet distance of features (n, D) to `reference`, from repeats / 2 mirrored pairs.

    Raises as `bootstrap_interval`.
    """
    if features.ndim != 2 or features.shape[1] != reference.dim:
        raise ShapeError(f"expected features (n, {reference.dim}) as the reference has, got {tuple(features.shape)}")
    if len(features) < 2:
        raise DataError("resampling needs at least two features; draw more samples")
    if groups is not None and groups.shape != features.shape[:1]:
        raise ShapeError(f"expected one group per feature ({len(features)}), got {tuple(groups.shape)}")
    if repeats < 4:
        raise ConfigError(f"expected repeats >= 4 (two mirrored pairs), got {repeats}")
    signs = STEP * half_signs(len(features), repeats // 2, seed, groups)
    plain = weighted_distances(features, reference, torch.ones(1, len(features), dtype=torch.float64))
    up, down = (weighted_distances(features, reference, 1 + s) for s in (signs, -signs))
    return Spread((up - down) / (2 * STEP), ((up + down) / 2 - plain) / STEP**2)


def weighted_distances(features: Tensor, reference: FeatureStatistics, weights: Tensor) -> Tensor:
    """(R,) float64: the Fréchet distance to `reference` of features (n, D) counted with each row of weights (R, n).

    Rows sum to n; weights are not negative.
    """
    n, dim = features.shape
    x = features.detach().to("cpu", torch.float64)
    centre = x.mean(0)
    x = x - centre  # E[x x^T] - mean mean^T loses no digits when the mean is small
    factor, shift = reference.factor, centre - reference.mean
    found = []
    for rows in weights.split(max(1, AT_ONCE // (dim * dim + n))):
        mean = rows @ x / n
        second = torch.stack([(x * row[:, None]).T @ x for row in rows])
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
    spread be far too large (several times on the digits). The interval is value +- z * error; percentiles of resampled
    distances would sit beside the estimate, for resampling biases them upwards.

    Raises ConfigError for fewer than 4 repeats or a level outside (0, 1), DataError without enough features,
    ShapeError for features of another length.
    """
    if not 0 < level < 1:
        raise ConfigError(f"expected 0 < level < 1, got {level}")
    count, n = (1 if groups is None else len(groups.unique())), len(features)
    if n < 2 * count:
        raise DataError(f"resampling {n} features in {count} groups says nothing; draw more samples or pass no groups")
    error = spread(features, reference, repeats, seed, groups).error
    value = frechet_distance(FeatureStatistics.of(features, reference.provenance), reference)
    return normal_interval(value, error, level)


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

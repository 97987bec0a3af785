"""The bootstrap against repeated sampling, against plain resampling, and what it refuses."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from pliant.errors import ConfigError, DataError, ShapeError
from pliant.evaluation import FeatureStatistics, bootstrap_interval, frechet_distance, spread
from pliant.evaluation.bootstrap import half_signs, student_interval, student_quantile, weighted_distances


def drawn(n: int, dim: int, seed: int) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REFERENCE = FeatureStatistics.of(drawn(5000, 6, 99) + 0.3)


def test_weights_are_copies() -> None:
    """Whole weights: the distance of the repeated rows, with the covariance over n - 1."""
    x = drawn(40, 6, 0) + 50  # far from zero: moments about zero would lose digits
    weights = torch.ones(2, 40, dtype=torch.float64)
    weights[1, :10], weights[1, 10:20] = 2, 0
    found = weighted_distances(x, REFERENCE, weights)
    for row, value in zip(weights, found, strict=True):
        rows = x.repeat_interleave(row.long(), 0)
        assert float(value) == pytest.approx(frechet_distance(FeatureStatistics.of(rows), REFERENCE), rel=1e-7)


def test_signs_make_a_mean_vary_as_samples_do() -> None:
    """Var(mean(s x)) is the unbiased variance over n, for even and odd groups; shares of groups never change."""
    groups = torch.tensor([0] * 7 + [1] * 4 + [2] + [3])
    x = drawn(13, 1, 0)[:, 0] + 5 * groups
    signs = half_signs(13, 40_000, 0, groups)
    for g in (0, 1):
        inside = signs[:, groups == g]
        assert float(inside.sum(1).abs().max()) < 1e-12
        k, own = inside.shape[1], x[groups == g]
        assert float((inside @ own / k).var()) == pytest.approx(float(own.var()) / k, rel=0.03)
    pooled = signs[:, 11:]  # two groups of one: together
    assert torch.equal(pooled.abs(), torch.ones_like(pooled)) and float(pooled.sum(1).abs().max()) == 0
    assert float(half_signs(5, 3, 0).abs().max()) < 2  # weights stay positive
    assert torch.equal(half_signs(1, 2, 0), torch.zeros(2, 1, dtype=torch.float64))


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_error_is_that_of_new_samples(shift: float) -> None:
    """Also at the reference itself, where the first derivative vanishes and a plain bootstrap is far too wide."""
    reference = FeatureStatistics(None, torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64))
    fresh = [frechet_distance(FeatureStatistics.of(drawn(300, 6, k) + shift), reference) for k in range(200)]
    truth = float(torch.tensor(fresh).std())
    found = [bootstrap_interval(drawn(300, 6, k) + shift, reference).standard_error for k in range(12)]
    assert sum(found) / 12 == pytest.approx(truth, rel=0.25)
    if shift == 0:
        plain = []
        for k in range(12):
            g = torch.Generator().manual_seed(k)
            counts = torch.stack([torch.randint(300, (300,), generator=g).bincount(minlength=300) for _ in range(100)])
            plain.append(float(weighted_distances(drawn(300, 6, k), reference, counts.double()).std()))
        assert sum(plain) / 12 > 1.5 * truth


def test_interval_covers_the_given_share_of_a_normal() -> None:
    x = drawn(300, 6, 0)
    found = bootstrap_interval(x, REFERENCE, level=0.9)
    assert found.value == pytest.approx(frechet_distance(FeatureStatistics.of(x), REFERENCE), rel=1e-12)
    assert found.high - found.value == pytest.approx(1.645 * found.standard_error, rel=1e-3)
    assert found.value - found.low == pytest.approx(found.high - found.value)
    assert found == bootstrap_interval(x, REFERENCE, level=0.9)


@pytest.mark.parametrize("size", [200, 4])
def test_balanced_groups_stay_balanced(size: int) -> None:
    def sample(seed: int) -> Tensor:
        rows = drawn(2 * size, 2, seed)
        rows[::2] += 10
        return rows + 0.5

    groups = torch.arange(2 * size) % 2
    reference = FeatureStatistics.of(torch.cat([sample(k) for k in range(1000, 1100)]) - 0.5)
    fresh = [frechet_distance(FeatureStatistics.of(sample(k)), reference) for k in range(100)]
    truth = float(torch.tensor(fresh).std())
    mean = sum(bootstrap_interval(sample(k), reference, groups=groups).standard_error for k in range(8)) / 8
    assert mean == pytest.approx(truth, rel=0.3)
    if size == 200:
        assert bootstrap_interval(sample(0), reference).standard_error > 4 * truth


def test_differences_of_plans_on_the_same_seeds() -> None:
    """The error of a difference is that of differences over fresh seeds, far below either plan's own."""

    def pair(seed: int) -> tuple[Tensor, Tensor]:
        x = drawn(400, 6, seed)
        return x, x + 0.05 * drawn(400, 6, 10_000 + seed) + 0.02

    def distance(x: Tensor) -> float:
        return frechet_distance(FeatureStatistics.of(x), REFERENCE)

    fresh = torch.tensor([distance(a) - distance(b) for a, b in map(pair, range(60))])
    a, b = (spread(v, REFERENCE) for v in pair(0))
    assert (a - b).error == pytest.approx(float(fresh.std()), rel=0.35)
    assert (a - b).error < 0.3 * a.error
    assert (a - a).error == 0


def test_fast_enough_for_a_search() -> None:
    x, reference = drawn(1000, 32, 0), FeatureStatistics.of(drawn(1000, 32, 1))
    bootstrap_interval(x, reference, repeats=4)
    begun = time.process_time()
    bootstrap_interval(x, reference)
    assert time.process_time() - begun < 2.0  # measured: 0.1 s


def test_student_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 7, 10, 31, 200):
        for p in (0.6, 0.95, 0.975):
            assert student_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-9)
    values = [1.0, 2.0, 4.0, 3.5]
    found = student_interval(values, 0.9)
    low, high = stats.t.interval(0.9, 3, sum(values) / 4, stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    with pytest.raises(DataError, match="at least two"):
        student_interval([1.0], 0.9)


def test_refusals() -> None:
    x = drawn(10, 6, 0)
    with pytest.raises(ConfigError, match="repeats"):
        bootstrap_interval(x, REFERENCE, repeats=3)
    with pytest.raises(ConfigError, match="level"):
        bootstrap_interval(x, REFERENCE, level=90)
    with pytest.raises(DataError, match="draw more"):
        bootstrap_interval(x[:1], REFERENCE)
    with pytest.raises(DataError, match="6 groups"):
        bootstrap_interval(x, REFERENCE, groups=torch.arange(10) % 6)
    with pytest.raises(ShapeError, match="one group per feature"):
        bootstrap_interval(x, REFERENCE, groups=torch.zeros(9))
    with pytest.raises(ShapeError, match=r"\(n, 6\)"):
        bootstrap_interval(x[:, :5], REFERENCE)

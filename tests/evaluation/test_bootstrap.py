"""The bootstrap against repeated sampling, against plain resampling, and what it refuses."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from pliant.errors import ConfigError, DataError, ShapeError
from pliant.evaluation import FeatureStatistics, bootstrap_interval, frechet_distance, resampled_distances
from pliant.evaluation.bootstrap import resampled_counts, student_interval, student_quantile


def drawn(n: int, dim: int, seed: int) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REFERENCE = FeatureStatistics.of(drawn(5000, 6, 99) + 0.3)


def test_weights_equal_copies() -> None:
    """Every resampled distance is the distance of the resampled rows."""
    x = drawn(40, 6, 0) + 50  # far from zero: moments about zero would lose digits
    counts = resampled_counts(40, 5, seed=3)
    assert torch.equal(counts.sum(1), torch.full((5,), 40.0, dtype=torch.float64))
    for row, found in zip(counts, resampled_distances(x, REFERENCE, 5, seed=3), strict=True):
        rows = x.repeat_interleave(row.long(), 0)
        assert float(found) == pytest.approx(frechet_distance(FeatureStatistics.of(rows), REFERENCE), rel=1e-7)


def test_spread_is_that_of_new_samples() -> None:
    """The standard error of one sample against 60 fresh samples; the interval holds the given share of a normal."""
    fresh = [frechet_distance(FeatureStatistics.of(drawn(300, 6, k)), REFERENCE) for k in range(1, 61)]
    spread = float(torch.tensor(fresh).std())
    found = bootstrap_interval(drawn(300, 6, 0), REFERENCE, level=0.9)
    assert found.value == pytest.approx(frechet_distance(FeatureStatistics.of(drawn(300, 6, 0)), REFERENCE), rel=1e-12)
    assert found.standard_error == pytest.approx(spread, rel=0.3)
    assert found.high - found.value == pytest.approx(1.645 * found.standard_error, rel=1e-3)
    assert found.value - found.low == pytest.approx(found.high - found.value)
    assert found == bootstrap_interval(drawn(300, 6, 0), REFERENCE, level=0.9)


@pytest.mark.parametrize("size", [200, 4])  # samples per class: with 4, the correction is 15 %
def test_balanced_groups_stay_balanced(size: int) -> None:
    def sample(seed: int) -> Tensor:
        rows = drawn(2 * size, 2, seed)
        rows[::2] += 10
        return rows + 0.5

    groups = torch.arange(2 * size) % 2
    counts = resampled_counts(2 * size, 7, 0, groups)
    assert torch.equal(counts[:, ::2].sum(1), torch.full((7,), float(size), dtype=torch.float64))
    reference = FeatureStatistics.of(torch.cat([sample(k) for k in range(1000, 1100)]) - 0.5)
    fresh = [frechet_distance(FeatureStatistics.of(sample(k)), reference) for k in range(60)]
    spread = float(torch.tensor(fresh).std())
    mean = sum(bootstrap_interval(sample(k), reference, groups=groups).standard_error for k in range(8)) / 8
    assert mean == pytest.approx(spread, rel=0.35)
    if size == 200:
        assert bootstrap_interval(sample(0), reference).standard_error > 4 * spread


def test_the_same_seeds_are_resampled_alike() -> None:
    """A difference of two plans on common samples varies less than either."""
    x, noise = drawn(400, 6, 0), 0.05 * drawn(400, 6, 1)
    a, b = (resampled_distances(v, REFERENCE, 100) for v in (x, x + noise))
    assert float((a - b).std()) < 0.2 * float(a.std())


def test_fast_enough_for_a_search() -> None:
    x, reference = drawn(1000, 32, 0), FeatureStatistics.of(drawn(1000, 32, 1))
    bootstrap_interval(x, reference, repeats=2)
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
        bootstrap_interval(x, REFERENCE, repeats=1)
    with pytest.raises(ConfigError, match="level"):
        bootstrap_interval(x, REFERENCE, level=90)
    with pytest.raises(DataError, match="draw more"):
        bootstrap_interval(x[:1], REFERENCE)
    with pytest.raises(DataError, match="10 groups"):
        bootstrap_interval(x, REFERENCE, groups=torch.arange(10))
    with pytest.raises(ShapeError, match="one group per feature"):
        bootstrap_interval(x, REFERENCE, groups=torch.zeros(9))
    with pytest.raises(ShapeError, match=r"\(n, 6\)"):
        bootstrap_interval(x[:, :5], REFERENCE)

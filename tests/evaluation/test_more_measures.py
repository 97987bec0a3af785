"""Density, coverage, Inception score and the Gaussian kernel against their definitions and known values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pliant.errors import ConfigError, DataError, ShapeError
from pliant.evaluation import Predictions, density_coverage, gaussian_distance, inception_score


def drawn(n: int, dim: int, seed: int) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_density_and_coverage_equal_their_definitions() -> None:
    """Equations (2) and (3) of arXiv 2002.09797, counted one by one."""
    real, fake, k = drawn(12, 3, 0), drawn(9, 3, 1) + 0.4, 2
    radius = [sorted(float((a - b).norm()) for j, b in enumerate(real) if j != i)[k - 1] for i, a in enumerate(real)]
    inside = [[float((y - x).norm()) <= r for x, r in zip(real, radius, strict=True)] for y in fake]
    found = density_coverage(real, fake, k)
    assert found.density == pytest.approx(sum(map(sum, inside)) / (k * 9), rel=1e-12)
    assert found.coverage == pytest.approx(sum(any(column) for column in zip(*inside, strict=True)) / 12, rel=1e-12)
    assert density_coverage(real, fake, k, block=4) == found


def test_coverage_of_real_by_real_is_the_papers() -> None:
    """About 1 - 2^-k, and density about 1, for two sets of one law (appendix A.2 and section 3.3)."""
    found = density_coverage(drawn(1500, 4, 0), drawn(1500, 4, 1), k=3)
    assert found.coverage == pytest.approx(1 - 0.5**3, abs=0.03)
    assert found.density == pytest.approx(1.0, abs=0.1)
    # One mode of two: precise (dense) but half covered. Collapsed onto one point, nothing is covered.
    two = torch.cat([drawn(300, 2, 2), drawn(300, 2, 3) + 50])
    half = density_coverage(two, drawn(600, 2, 4))
    assert half.density > 0.9 and half.coverage < 0.55
    assert density_coverage(two, torch.zeros(600, 2)).coverage < 0.1


def test_an_outlier_widens_precision_but_not_density() -> None:
    """Why density exists: one real outlier gives a ball so large that bad samples fall into it (their figure 1)."""
    from pliant.evaluation import precision_recall

    real = torch.cat([drawn(200, 2, 0), torch.tensor([[40.0, 0.0]], dtype=torch.float64)])
    bad = drawn(200, 2, 1) * 0.5 + torch.tensor([40.0, 0.0])
    assert precision_recall(real, bad).precision > 0.95
    assert density_coverage(real, bad).density < 0.3


def test_inception_score_of_known_predictions() -> None:
    sure = 50 * torch.eye(5).repeat(4, 1)
    assert Predictions.of(sure).score == pytest.approx(5.0)
    assert Predictions.of(torch.zeros(7, 5)).score == pytest.approx(1.0)
    assert Predictions.of(sure[:1].expand(9, -1)).score == pytest.approx(1.0)  # one class only
    logits = 2 * drawn(60, 4, 0)
    p = logits.softmax(1)
    divergence = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert Predictions.of(logits).score == pytest.approx(math.exp(float(divergence)), rel=1e-12)
    streamed = Predictions.of(logits[:7]) + Predictions.of(logits[7:])
    assert streamed.score == pytest.approx(Predictions.of(logits).score, rel=1e-12)
    assert inception_score(logits, 3) == tuple(Predictions.of(part).score for part in logits.split(20))
    # A certain prediction has logits of -inf probability elsewhere; 0 log 0 is 0.
    assert math.isfinite(Predictions.of(torch.tensor([[0.0, -2000.0], [-2000.0, 0.0]])).score)


def test_gaussian_distance_equals_its_definition() -> None:
    x, y = drawn(7, 3, 0), drawn(5, 3, 1) + 1

    def mean(a: Tensor, b: Tensor) -> float:
        pairs = [(u / u.norm() - v / v.norm()).square().sum() for u in a for v in b]
        return sum(math.exp(-float(d) / (2 * 0.5**2)) for d in pairs) / len(pairs)

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert gaussian_distance(x, y, bandwidth=0.5) == pytest.approx(expected, rel=1e-9)
    assert gaussian_distance(x, y, bandwidth=0.5, block=2) == pytest.approx(expected, rel=1e-9)
    assert gaussian_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert gaussian_distance(3 * x, y) == pytest.approx(gaussian_distance(x, y), rel=1e-9)  # lengths do not matter


def test_gaussian_distance_grows_with_the_shift() -> None:
    """In one direction only: unit vectors do not see a change of length."""
    one = torch.eye(8, dtype=torch.float64)[0]
    values = [gaussian_distance(drawn(400, 8, 0), drawn(400, 8, 1) + s * one) for s in (0.0, 1.0, 3.0)]
    assert values[0] < 0.3 * values[1] and values[1] < 0.5 * values[2]


def test_refusals() -> None:
    with pytest.raises(DataError, match="more than k"):
        density_coverage(drawn(5, 2, 0), drawn(9, 2, 0))
    with pytest.raises(ShapeError):
        density_coverage(drawn(9, 2, 0), drawn(9, 3, 0))
    with pytest.raises(ShapeError, match="two classes"):
        Predictions.of(drawn(5, 1, 0))
    with pytest.raises(DataError, match="NaN"):
        Predictions.of(torch.full((2, 3), math.nan))
    with pytest.raises(ShapeError, match="different classes"):
        Predictions.of(drawn(5, 2, 0)) + Predictions.of(drawn(5, 3, 0))
    with pytest.raises(DataError, match="6 parts"):
        inception_score(drawn(5, 2, 0), 6)
    with pytest.raises(ShapeError):
        gaussian_distance(drawn(5, 2, 0), drawn(5, 3, 0))
    with pytest.raises(DataError):
        gaussian_distance(drawn(0, 2, 0), drawn(5, 2, 0))
    with pytest.raises(ConfigError, match="bandwidth"):
        gaussian_distance(drawn(5, 2, 0), drawn(5, 2, 0), bandwidth=0)

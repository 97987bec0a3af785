"""Fréchet distance against closed forms, and the properties that a wrong sign or transpose would break."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.errors import ConfigError, DataError, FormatError, ShapeError
from pliant.evaluation import (
    FeatureStatistics,
    frechet_distance,
    frechet_distance_unbiased,
)
from pliant.evaluation.frechet import stratified_order


def gaussian(mean: torch.Tensor, cov: torch.Tensor) -> FeatureStatistics:
    return FeatureStatistics(None, mean.double(), cov.double())


def rotation(dim: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64)).Q


def drawn(n: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_diagonal_closed_form() -> None:
    """Commuting covariances: sum (sqrt(l1) - sqrt(l2))^2 + |shift|^2."""
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 0.25])
    shift = torch.tensor([1.0, -2.0, 0.5])
    value = frechet_distance(gaussian(torch.zeros(3), a.diag()), gaussian(shift, b.diag()))
    assert value == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum() + shift.square().sum()), rel=1e-12)


def test_two_dimensions_that_do_not_commute() -> None:
    """For 2x2 matrices tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), with M = C1 C2."""
    c1 = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    c2 = torch.tensor([[1.0, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    m = c1 @ c2
    root = math.sqrt(float(m.trace()) + 2 * math.sqrt(float(torch.linalg.det(m))))
    expected = float(c1.trace() + c2.trace()) - 2 * root
    zero = torch.zeros(2)
    assert frechet_distance(gaussian(zero, c1), gaussian(zero, c2)) == pytest.approx(expected, rel=1e-12)


def test_rank_deficient_covariances() -> None:
    """Two lines at an angle: C = u u^T s; tr sqrt(C1 C2) = sqrt(s1 s2) |cos|."""
    u = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    v = torch.tensor([math.cos(0.7), math.sin(0.7), 0.0], dtype=torch.float64)
    zero = torch.zeros(3)
    value = frechet_distance(gaussian(zero, 4 * torch.outer(u, u)), gaussian(zero, 9 * torch.outer(v, v)))
    assert value == pytest.approx(13 - 2 * 6 * math.cos(0.7), rel=1e-12)


@pytest.mark.parametrize("n", [3, 20, 500])
def test_identical_statistics_are_at_zero(n: int) -> None:
    """Also with fewer features than dimensions, where the usual matrix square root loses half its digits."""
    s = FeatureStatistics.of(drawn(n, 64, 0) * 100)
    assert frechet_distance(s, s) <= 1e-10 * float(s.cov.trace())


def test_matches_the_matrix_square_root_of_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = FeatureStatistics.of(drawn(200, 16, 1)), FeatureStatistics.of(drawn(300, 16, 2) * 1.5 + 0.2)
    root = linalg.sqrtm((a.cov @ b.cov).numpy()).real.trace()
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(2, 40), st.integers(0, 1000), st.floats(-3, 3))
def test_symmetric_nonnegative_and_rotation_invariant(dim: int, n: int, seed: int, shift: float) -> None:
    x, y = drawn(n, dim, seed), drawn(n + 3, dim, seed + 1) * 0.7 + shift
    q = rotation(dim, seed)
    a, b = FeatureStatistics.of(x), FeatureStatistics.of(y)
    value = frechet_distance(a, b)
    turned = frechet_distance(FeatureStatistics.of(x @ q + 5), FeatureStatistics.of(y @ q + 5))
    scale = float(a.cov.trace() + b.cov.trace()) + value
    assert value >= 0
    assert frechet_distance(b, a) == pytest.approx(value, abs=1e-9 * scale)
    # Rank-deficient roots see rounding of the covariance at its square root.
    assert turned == pytest.approx(value, abs=1e-7 * scale)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 17), min_size=1, max_size=6), st.integers(0, 1000))
def test_streaming_equals_batch(sizes: list[int], seed: int) -> None:
    x = drawn(sum(sizes), 5, seed) + 100  # far from zero: naive sums of squares would show
    parts = [FeatureStatistics.of(p) for p in x.split(sizes)]
    merged = parts[0]
    for p in parts[1:]:
        merged = merged.merge(p)
    whole = FeatureStatistics.of(x)
    assert merged.n == whole.n
    assert torch.allclose(merged.mean, whole.mean, rtol=1e-13)
    assert torch.allclose(merged.cov, whole.cov, rtol=1e-9, atol=1e-10)


def test_covariance_is_unbiased() -> None:
    x = drawn(50, 3, 0)
    assert torch.allclose(FeatureStatistics.of(x).cov, torch.cov(x.T), rtol=1e-12)


def test_extrapolation_recovers_the_closed_form() -> None:
    """Samples of N(m, S) against the exact N(0, I): the plain value is far off, the extrapolated is not."""
    dim, scale, shift = 16, 1.2, 0.1
    features = drawn(2000, dim, 3) * scale + shift
    reference = gaussian(torch.zeros(dim), torch.eye(dim))
    exact = dim * (scale - 1) ** 2 + dim * shift**2
    result = frechet_distance_unbiased(features, reference)
    plain = frechet_distance(FeatureStatistics.of(features[:300]), reference)
    assert plain > 1.3 * exact
    assert result.value == pytest.approx(exact, rel=0.1)
    assert result.slope > 0
    assert result.sizes[0] == 2000
    assert result == frechet_distance_unbiased(features, reference)  # seeded


def test_extrapolation_keeps_balanced_classes_balanced() -> None:
    """Classes far apart, drawn exactly balanced: random subsets would be unbalanced and look worse than they are."""
    labels = torch.arange(600) % 3
    centres = 10 * torch.eye(3, 4, dtype=torch.float64)
    features = centres[labels] + drawn(600, 4, 1)
    everything = centres[torch.arange(60000) % 3] + drawn(60000, 4, 2)
    reference = FeatureStatistics.of(everything)
    shuffled = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    balanced = frechet_distance_unbiased(features[shuffled], reference, labels[shuffled])
    plain = frechet_distance_unbiased(features[shuffled], reference)
    assert balanced.distances[-1] < plain.distances[-1] / 2
    assert abs(balanced.value) < abs(plain.value)
    order = stratified_order(600, labels, torch.Generator().manual_seed(3))
    assert order.sort().values.equal(torch.arange(600))
    assert (labels[order].view(20, 30).sum(1) - 30).abs().max() <= 3


def test_extrapolation_refuses_too_few_samples() -> None:
    reference = gaussian(torch.zeros(16), torch.eye(16))
    with pytest.raises(DataError, match="at least 64"):
        frechet_distance_unbiased(drawn(63, 16, 0), reference)
    with pytest.raises(ConfigError):
        frechet_distance_unbiased(drawn(100, 16, 0), reference, points=1)
    with pytest.raises(ShapeError, match="one group per feature"):
        frechet_distance_unbiased(drawn(100, 16, 0), reference, torch.zeros(99))


def test_saved_statistics_come_back_exactly(tmp_path: Path) -> None:
    facts = {"extractor": "digits-classifier", "preprocessing": "8-bit", "reference_sha256": "ab"}
    s = FeatureStatistics.of(drawn(9, 4, 0), facts)
    s.save(tmp_path / "s.safetensors")
    back = FeatureStatistics.load(tmp_path / "s.safetensors")
    assert back.n == 9 and dict(back.provenance) == facts
    assert torch.equal(back.mean, s.mean) and torch.equal(back.cov, s.cov)


def test_damaged_or_foreign_statistics_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(FormatError):
        FeatureStatistics.load(tmp_path / "missing.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(FormatError):
        FeatureStatistics.load(tmp_path / "junk.safetensors")
    save_file({"mean": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match="not a file of feature statistics"):
        FeatureStatistics.load(tmp_path / "other.safetensors")


def test_bad_input_is_refused_with_a_reason() -> None:
    good = FeatureStatistics.of(drawn(5, 3, 0), {"extractor": "a"})
    with pytest.raises(ShapeError, match="same extractor"):
        frechet_distance(good, FeatureStatistics.of(drawn(5, 4, 0)))
    with pytest.raises(DataError, match="differ in extractor"):
        frechet_distance(good, FeatureStatistics.of(drawn(5, 3, 0), {"extractor": "b"}))
    with pytest.raises(DataError, match="at least two"):
        frechet_distance(good, FeatureStatistics.of(drawn(1, 3, 0)))
    with pytest.raises(DataError, match="NaN"):
        FeatureStatistics.of(torch.full((3, 3), float("nan")))
    with pytest.raises(DataError, match="negative eigenvalue"):
        frechet_distance(gaussian(torch.zeros(2), -torch.eye(2)), gaussian(torch.zeros(2), torch.eye(2)))
    with pytest.raises(ShapeError):
        FeatureStatistics.of(torch.zeros(3))

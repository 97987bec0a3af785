"""Kernel distance and precision/recall."""

from __future__ import annotations

import pytest
import torch

from pliant.errors import DataError, ShapeError
from pliant.evaluation import kernel_distance, precision_recall


def drawn(n: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kernel_distance_equals_its_definition() -> None:
    x, y = drawn(7, 3, 0), drawn(5, 3, 1)

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 3 + 1) ** 3)

    own_x = sum(k(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / 42
    own_y = sum(k(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / 20
    cross = sum(k(a, b) for a in x for b in y) / 35
    assert kernel_distance(x, y) == pytest.approx(own_x + own_y - 2 * cross, rel=1e-12)
    assert kernel_distance(x, y, block=2) == pytest.approx(kernel_distance(x, y), rel=1e-12)


def test_kernel_distance_is_unbiased_for_equal_laws() -> None:
    """Mean over many tiny draws is zero within its standard error; the biased form would be far above."""
    values = torch.tensor([kernel_distance(drawn(6, 4, 2 * s), drawn(6, 4, 2 * s + 1)) for s in range(1500)])
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean())) < 3 * error
    assert (values < 0).any()
    assert kernel_distance(drawn(200, 4, 0), drawn(200, 4, 1) + 1) > 1


def test_precision_and_recall_of_known_sets() -> None:
    real = torch.cat([drawn(200, 2, 0), drawn(200, 2, 1) + 50])
    one_mode = drawn(200, 2, 2)
    far = drawn(200, 2, 3) - 500
    half = precision_recall(real, one_mode)
    assert half.precision > 0.9 and 0.4 < half.recall < 0.5
    assert precision_recall(real, far).precision == 0 and precision_recall(real, far).recall == 0
    same = precision_recall(real, real)
    assert same.precision == same.recall == 1
    assert precision_recall(real, one_mode, block=7) == half


def test_bad_input() -> None:
    with pytest.raises(DataError):
        kernel_distance(drawn(1, 2, 0), drawn(5, 2, 0))
    with pytest.raises(ShapeError):
        kernel_distance(drawn(5, 2, 0), drawn(5, 3, 0))
    with pytest.raises(DataError):
        precision_recall(drawn(3, 2, 0), drawn(5, 2, 0), k=3)
    with pytest.raises(ShapeError):
        precision_recall(drawn(5, 2, 0), drawn(5, 3, 0))

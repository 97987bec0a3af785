"""Learning rates by value."""

import pytest

from pliant.training.schedule import learning_rate


def test_warmup_then_constant() -> None:
    assert [learning_rate(k, 1.0, warmup=4) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_halves_in_the_middle_and_ends_at_zero() -> None:
    rates = [learning_rate(k, 2.0, warmup=10, decay="cosine", steps=110) for k in (10, 60, 110, 200)]
    assert rates == pytest.approx([2.0, 1.0, 0.0, 0.0])

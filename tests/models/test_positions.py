"""Positions of patches of any size (sheet A, 1.4(1) and 3.1(2))."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.errors import ConfigError
from pliant.models.positions import axis_coordinates, patch_positions, sincos_axis, sincos_grid


def test_centres_of_weak_patches() -> None:
    assert axis_coordinates(3, 4, 2, "center").tolist() == [0.5, 2.5, 4.5]
    assert axis_coordinates(3, 4, 2, "corner").tolist() == [0, 2, 4]
    assert axis_coordinates(3, 4, 2, "own").tolist() == [0, 1, 2]
    assert axis_coordinates(4, 1, 2, "center").tolist() == [-0.25, 0.25, 0.75, 1.25]
    with pytest.raises(ConfigError, match="unknown position rule 'centre'"):
        axis_coordinates(3, 4, 2, "centre")  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["center", "corner", "own"]))
def test_all_rules_are_the_index_at_the_original_size(count: int, patch: int, rule: str) -> None:
    assert axis_coordinates(count, patch, patch, rule).tolist() == list(range(count))  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_centre_is_the_mean_of_the_patches_it_covers(count: int, ratio: int, patch: int) -> None:
    """A coarse patch sits in the middle of the fine patches under it, in any unit."""
    fine = axis_coordinates(count * ratio, patch, patch, "center")
    coarse = axis_coordinates(count, patch * ratio, patch, "center")
    torch.testing.assert_close(coarse, fine.view(count, ratio).mean(1))


def test_code_of_one_axis() -> None:
    """`[sin(g w), cos(g w)]`, w from 1 down to 10000^(-(n-1)/n)."""
    code = sincos_axis(torch.tensor([0.0, 1.5], dtype=torch.float64), 8)
    assert code[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    expected = [math.sin(1.5 * 10000 ** (-k / 4)) for k in range(4)]
    assert code[1, :4].tolist() == pytest.approx(expected, abs=1e-15)


def test_the_column_comes_first() -> None:
    """Official DiT's table: the first half of the channels depends on the column only, the second on the row only."""
    table = sincos_grid(torch.arange(3.0).double(), torch.arange(4.0).double(), 16).view(3, 4, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8])
    assert torch.equal(table[:, 0, 8:], table[:, 3, 8:])
    assert not torch.equal(table[0, 0, :8], table[0, 1, :8])
    assert torch.equal(table[1, 2, :8], sincos_axis(torch.tensor([2.0]).double(), 8)[0])
    assert torch.equal(table[1, 2, 8:], sincos_axis(torch.tensor([1.0]).double(), 8)[0])
    with pytest.raises(ConfigError, match="divisible by 4"):
        sincos_grid(torch.arange(3.0), torch.arange(3.0), 6)


def test_rectangular_patches_of_a_rectangular_image() -> None:
    """16 x 8 pixels in patches of (4, 2), in units of (2, 2): rows 0.5, 2.5, ..., columns 0, 1, ..."""
    table = patch_positions((4, 4), (4, 2), (2, 2), 16)
    rows = torch.tensor([0.5, 2.5, 4.5, 6.5], dtype=torch.float64)
    assert torch.equal(table, sincos_grid(rows, torch.arange(4).double(), 16).float())
    assert table.dtype == torch.float32

"""Samples to PNG files and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pliant import imaging
from pliant.errors import DataError
from pliant.evaluation import to_uint8


def test_pixels_are_rounded_as_evaluation_rounds() -> None:
    x = torch.linspace(-1.2, 1.2, 1000)
    assert torch.equal(imaging.to_pixels(x), to_uint8(x))
    with pytest.raises(DataError, match="NaN"):
        imaging.to_pixels(torch.tensor([0.0, float("nan")]))


def test_enlarging_repeats() -> None:
    x = torch.tensor([[[1, 2], [3, 4]]], dtype=torch.uint8)
    assert imaging.enlarged(x, 2).tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]]
    assert [imaging.zoom_for(h, w) for h, w in ((8, 8), (32, 32), (40, 64), (256, 256))] == [8, 2, 1, 1]


def test_grid_is_row_major_and_fills_up() -> None:
    tiles = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert imaging.grid(tiles, 2, gap=0)[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 255, 255], [2, 2, 255, 255]]
    assert imaging.grid(tiles, 3, gap=1).shape == (1, 2, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(channels: int, tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (channels, 5, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    recipe = {"name": "é 漢", "steps": [1, 2.5, None]}
    file = tmp_path / "x.png"
    file.write_bytes(imaging.encode_png(pixels, recipe))
    back, found = imaging.read_png(file)
    assert torch.equal(back, pixels)
    assert found == recipe
    file.write_bytes(imaging.encode_png(pixels))
    assert imaging.read_png(file)[1] is None


def test_unreadable_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        imaging.read_png(tmp_path / "none.png")
    (tmp_path / "x.png").write_bytes(imaging.encode_png(torch.zeros(1, 64, 64, dtype=torch.uint8))[:60])
    with pytest.raises(DataError, match="not a readable PNG"):
        imaging.read_png(tmp_path / "x.png")
    with pytest.raises(DataError, match="channels"):
        imaging.encode_png(torch.zeros(4, 2, 2, dtype=torch.uint8))

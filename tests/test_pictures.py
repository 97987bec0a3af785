"""Pictures and digits: training and evaluation see the same ones."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pliant import evaluation
from pliant.errors import DataError
from pliant.pictures import digit_levels, fitted, open_cell, over_white
from pliant.training import data


@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_one_set_of_digits(split: str) -> None:
    pytest.importorskip("sklearn")
    levels, labels = digit_levels(split)
    trained = data.digits(1, (8, 8), split)
    measured = evaluation.digits(split)  # type: ignore[arg-type]
    assert torch.equal(trained.pixels.double(), levels[:, None] / 8 - 1)
    assert torch.equal(trained.labels, labels)
    assert measured.labels is not None and torch.equal(measured.labels, labels)
    # Eight bits: at most half a level from the exact value.
    assert float((evaluation.from_uint8(measured.images) - trained.pixels).abs().max()) <= 0.5 / 127.5 + 1e-6


def test_splits() -> None:
    pytest.importorskip("sklearn")
    everything, labels = digit_levels()
    assert torch.equal(digit_levels("test")[0], everything[::5])
    assert len(digit_levels("train")[1]) + len(digit_levels("test")[1]) == len(labels) == 1797
    with pytest.raises(DataError, match="splits train, test and all"):
        digit_levels("val")
    everything.zero_()  # nobody else's digits
    assert float(digit_levels()[0].max()) == 16.0


def test_pictures_are_fitted() -> None:
    array = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    image = open_cell({"bytes": buffer.getvalue(), "path": None})
    assert np.array_equal(fitted(image, "RGB"), array[..., :3])
    assert fitted(image, "L", (4, 4)).shape == (4, 4)
    # alpha*colour + (1-alpha)*white, to the nearest level
    alpha = array[..., 3:] / 255
    shown = fitted(over_white(image), "RGB").astype(float)
    assert np.abs(shown - (alpha * array[..., :3] + (1 - alpha) * 255)).max() <= 1.0
    with pytest.raises(DataError, match="cannot read an image from float"):
        open_cell(1.0)

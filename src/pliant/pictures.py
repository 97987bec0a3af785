"""Pictures from files and data sets, and the bundled digits: for those who train on them and those who measure."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pliant.errors import DataError, PliantError

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "test", "all")


def open_cell(cell: Any, folder: Path | None = None) -> Image:
    """An image column's cell as a PIL image: bytes, {"bytes", "path"} (Hugging Face), a path or an image.

    Raises whatever PIL raises for damaged data, and DataError for a cell that is none of these.
    """
    from PIL import Image as images

    if isinstance(cell, images.Image):
        return cell
    if isinstance(cell, dict):
        data, path = cell.get("bytes"), cell.get("path")
        if data is not None:
            return open_cell(data)
        if path is not None:
            return open_cell(Path(path) if folder is None else folder / path)
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return images.open(io.BytesIO(bytes(cell)))
    if isinstance(cell, (str, Path)):
        return images.open(cell)
    if isinstance(cell, np.ndarray) and cell.dtype == np.uint8:
        return images.fromarray(cell)
    raise DataError(f"cannot read an image from {type(cell).__name__}; expected bytes or {{'bytes', 'path'}}")


def over_white(image: Image) -> Image:
    """The image with what is transparent in it shown over white; others as they are."""
    from PIL import Image as images

    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return images.alpha_composite(images.new("RGBA", image.size, "white"), image)


def fitted(image: Image, mode: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8, a copy. mode: "L" or "RGB" (drops transparency).

    size: (H, W); the centre is cropped to its shape and resized (bicubic, antialiased).
    """
    from PIL import Image as images
    from PIL import ImageOps

    image = image.convert(mode)
    if size is not None and image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), images.Resampling.BICUBIC)
    return np.array(image, dtype=np.uint8, copy=True)  # PIL's own buffer is read-only, which torch warns about


@cache
def _all_digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise PliantError("the digits come with scikit-learn, which is not installed: pip install scikit-learn") from e
    data = load_digits()
    levels = torch.from_numpy(np.asarray(data.images, dtype=np.float64))
    return levels, torch.from_numpy(np.asarray(data.target, dtype=np.int64))


def digit_levels(split: str = "all") -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 bundled 8x8 digits: levels 0..16 (N, 8, 8) float64, white on black, and labels (N,) int64.

    Images 0, 5, 10, ... are the test split. Raises DataError for an unknown split, PliantError without scikit-learn.
    """
    if split not in SPLITS:
        raise DataError(f"digits has the splits train, test and all, not {split!r}")
    levels, labels = _all_digits()
    held_out = torch.arange(len(labels)) % 5 == 0
    keep = {"train": ~held_out, "test": held_out, "all": torch.ones_like(held_out)}[split]
    return levels[keep], labels[keep]

"""From image files to pixel tensors of one size."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pliant.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

CHANNEL_MODES = {1: "L", 3: "RGB"}


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


def to_pixels(image: Image, channels: int, size: tuple[int, int]) -> Tensor:
    """(channels, H, W) uint8: shorter side resized (bicubic), centre crop, transparency over white.

    channels: 1 (grey) or 3 (RGB); size: (H, W).
    """
    from PIL import Image as images
    from PIL import ImageOps

    if channels not in CHANNEL_MODES:
        raise DataError(f"images have 1 or 3 channels, the model wants {channels}; train it on latents instead")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = images.alpha_composite(images.new("RGBA", image.size, "white"), image)
    image = image.convert(CHANNEL_MODES[channels])
    height, width = size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), images.Resampling.BICUBIC)
    # Copy: PIL's buffer is read-only, which torch warns about.
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8, copy=True))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def normalise(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [-1, 1]; float tensors are taken as they are."""
    return pixels.float() / 127.5 - 1.0 if pixels.dtype == torch.uint8 else pixels.float()

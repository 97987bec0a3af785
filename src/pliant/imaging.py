"""Pictures: from samples in [-1, 1] to eight-bit PNG files with a recipe inside, and back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.errors import DataError

RECIPE_KEY = "pliant"
"""Name of the tEXt chunk that holds the recipe as JSON."""
VISIBLE = 64
"""Side in pixels up to which small images are enlarged for people."""


def to_pixels(images: Tensor) -> Tensor:
    """Floats in [-1, 1] (values beyond are clamped) -> uint8 of the same shape, on the CPU, rounded to nearest.

    Raises DataError for NaN: a broken sample must not become a black one.
    """
    values = images.detach().float().cpu()
    if torch.isnan(values).any():
        raise DataError("the samples contain NaN: the model or the plan diverged, so there is no picture to save")
    return ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def zoom_for(height: int, width: int, at_least: int = VISIBLE) -> int:
    """Whole factor that brings the longer side to about `at_least` pixels; 1 for images that are large enough."""
    return max(1, round(at_least / max(height, width)))


def enlarged(pixels: Tensor, zoom: int) -> Tensor:
    """(..., H, W) -> (..., H*zoom, W*zoom) by repetition."""
    return pixels.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)


GAP = 4
"""Pixels between the images of a sheet."""


def grid(pixels: Tensor, columns: int, gap: int = GAP, background: int = 255) -> Tensor:
    """(N, C, H, W) uint8 -> one picture (C, rows*H + ..., columns*W + ...), row-major; missing tiles are background."""
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = pixels.new_full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), background)
    for k in range(count):
        top, left = (k // columns) * (height + gap), (k % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = pixels[k]
    return sheet


def to_picture(pixels: Tensor) -> Any:
    """(1 or 3, H, W) uint8 -> a PIL image. Raises DataError for other channel counts."""
    from PIL import Image

    if pixels.shape[0] not in (1, 3):
        raise DataError(f"a picture has 1 or 3 channels, not {pixels.shape[0]}; decode latents first")
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def encode_png(pixels: Tensor, recipe: dict[str, Any] | None = None) -> bytes:
    """(1 or 3, H, W) uint8 -> the bytes of a PNG, with `recipe` as JSON in a tEXt chunk."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if recipe is not None:
        # tEXt is Latin-1; json's default escapes everything beyond ASCII.
        info.add_text(RECIPE_KEY, json.dumps(recipe, separators=(",", ":")))
    buffer = io.BytesIO()
    to_picture(pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_png(file: str | Path) -> tuple[Tensor, dict[str, Any] | None]:
    """(C, H, W) uint8 pixels and the recipe of a PNG (None if it has none). Raises DataError if it is unreadable."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            picture.load()
            text = getattr(picture, "text", {}).get(RECIPE_KEY)
            array = np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{file} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{file} is not a readable PNG ({error})") from None
    pixels = torch.from_numpy(array.copy())
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
    if text is None:
        return pixels, None
    try:
        recipe = json.loads(text)
    except json.JSONDecodeError:
        recipe = None
    if not isinstance(recipe, dict):
        raise DataError(f"{file} has a damaged recipe in its metadata; it cannot be replayed")
    return pixels, recipe

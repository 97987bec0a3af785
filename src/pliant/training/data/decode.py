"""From pictures to training pixels of one size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pliant.errors import DataError
from pliant.pictures import fitted, over_white

if TYPE_CHECKING:
    from PIL.Image import Image

CHANNEL_MODES = {1: "L", 3: "RGB"}


def to_pixels(image: Image, channels: int, size: tuple[int, int]) -> Tensor:
    """(channels, H, W) uint8: shorter side resized (bicubic), centre crop, transparency over white.

    channels: 1 (grey) or 3 (RGB); size: (H, W).
    """
    if channels not in CHANNEL_MODES:
        raise DataError(f"images have 1 or 3 channels, the model wants {channels}; train it on latents instead")
    pixels = torch.from_numpy(fitted(over_white(image), CHANNEL_MODES[channels], size))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def normalise(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [-1, 1]; float tensors are taken as they are."""
    return pixels.float() / 127.5 - 1.0 if pixels.dtype == torch.uint8 else pixels.float()

"""Sample grids during training: one PNG per visit, a block of rows per patch size, one column per class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.plans import sample, uniform
from pliant.training.config import SamplingConfig


def grid_sampler(
    config: SamplingConfig, folder: Path, decode: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Denoiser, int], None]:
    """A function that writes `folder/step-000500.png` for a denoiser and a step. The same seeds every time.

    decode: latents (B, C, H, W) -> images in [-1, 1]; needed if the model's channels are not 1 or 3.
    """

    def write(denoiser: Denoiser, step: int) -> None:
        classes = torch.arange(min(config.columns, denoiser.num_classes)).repeat(config.rows)
        blocks = []
        for patch in denoiser.patch_sizes:
            plan = uniform(denoiser, config.steps, config.solver, Compute(patch=patch), config.guidance)
            blocks.append(sample(denoiser, plan, classes, list(range(len(classes)))))
        images = torch.cat(blocks)
        save_grid(images if decode is None else decode(images), folder / f"step-{step:06d}.png", config.columns)

    return write


def save_grid(images: Tensor, file: Path, columns: int) -> None:
    """Write (B, 1 or 3, H, W) images in [-1, 1] as one PNG, `columns` per row; small ones are enlarged.

    Values beyond the range are clamped, NaN becomes black. Raises ConfigError for other channel counts.
    """
    from PIL import Image

    if images.shape[1] not in (1, 3):
        raise ConfigError(f"a grid shows 1 or 3 channels, got {images.shape[1]}; pass decode= for latents")
    count, channels, height, width = images.shape
    columns = min(columns, count)
    zoom = max(1, 64 // max(height, width))
    pixels = ((torch.nan_to_num(images.float().cpu(), nan=-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = torch.cat([pixels, pixels.new_zeros(-count % columns, channels, height, width)])
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    rows = pixels.shape[0] // columns
    sheet = pixels.view(rows, columns, channels, height * zoom, width * zoom).permute(0, 3, 1, 4, 2)
    array = sheet.reshape(rows * height * zoom, columns * width * zoom, channels).numpy()
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array[:, :, 0] if channels == 1 else array).save(file)

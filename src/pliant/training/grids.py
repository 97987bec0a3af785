"""Sample grids during training: one PNG per visit, a block of rows per patch size, one column per class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pliant import imaging
from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.files import replaced_file
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

    NaN, which an early average can produce, becomes black. Raises DataError for other channel counts, OSError.
    """
    pixels = imaging.to_pixels(torch.nan_to_num(images, nan=-1.0))
    large = imaging.enlarged(pixels, imaging.zoom_for(*pixels.shape[2:]))
    sheet = imaging.grid(large, min(columns, len(pixels)))
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(file) as temporary:
        temporary.write_bytes(imaging.encode_png(sheet))

"""Training images of any size and shape: the resize rule without cropping, and sets whose images differ in size."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from pliant.errors import ConfigError, DataError
from pliant.pictures import open_cell, over_white
from pliant.training.data.decode import CHANNEL_MODES, normalise, to_pixels
from pliant.training.data.images import MEMORY_LIMIT, workers
from pliant.training.data.sources import Source, open_source
from pliant.training.draws import Draws, derived_seed

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("pliant.training")


@runtime_checkable
class SizedSet(Protocol):
    """A training set whose samples differ in size. One call of `samples` takes samples of one size."""

    labels: Tensor
    """(N,) int64, CPU."""
    sizes: Tensor
    """(N, 2) int64: height and width of every sample, in its own pixels (image or latent)."""
    class_names: tuple[str, ...]

    def samples(self, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        """(B, C, H, W) as a `TrainingSet`'s. Raises DataError if the indices are of several sizes."""
        ...


def fitted_size(height: int, width: int, side: int, unit: int) -> tuple[int, int]:
    """(H, W) to resize an image to: at most side*side pixels, sides multiples of `unit`, aspect kept up to rounding.

    FiTv2's rule (sheet B, section 1): larger images shrink to the area side^2, an image thinner than a unit grows to
    it, nothing else is enlarged; then both sides are rounded down. Raises ConfigError for a side below the unit,
    DataError for an image so long and thin that it would be enlarged beyond the area.
    """
    if unit < 1 or side < unit:
        raise ConfigError(f"the training side {side} must be at least one unit of {unit} pixels")
    if height < 1 or width < 1:
        raise DataError(f"an image of {height}x{width} pixels is empty")
    new_height, new_width = float(height), float(width)
    if height * width >= side**2:
        new_width = math.sqrt(width / height) * side
        new_height = new_width * height / width
    elif width < unit:
        new_height, new_width = unit * height / width, float(unit)
    elif height < unit:
        new_height, new_width = float(unit), unit * width / height
    # A billionth: 2 * 16 must not become 31.999 by way of a square root.
    rows, columns = int(new_height / unit + 1e-9), int(new_width / unit + 1e-9)
    if rows < 1 or columns < 1 or rows * columns * unit**2 > side**2:
        raise DataError(
            f"an image of {height}x{width} pixels is too long and thin for {side}x{side} pixels in units of {unit}"
        )
    return rows * unit, columns * unit


class AnySizeImages:
    """Images resized without cropping, in memory while they fit. Damaged ones are left out and named.

    crop: share of the images larger than `side` in both directions that are cut to the square in their middle instead
    (FiTv2's "mixed" data: a half); which ones depends on their places in the source alone.
    """

    def __init__(
        self,
        source: Source,
        channels: int,
        side: int,
        unit: int,
        crop: float = 0.0,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        """Decodes every image once. Raises DataError if none can be used."""
        self._crop = crop
        if channels not in CHANNEL_MODES:
            raise DataError(f"images have 1 or 3 channels, not {channels}; train on latents instead")
        self._source, self._channels, self._side, self._unit = source, channels, side, unit
        kept: list[int] = []
        sizes: list[tuple[int, int]] = []
        self._pixels: list[Tensor | None] = []
        skipped: list[str] = []
        room = memory_limit
        with ThreadPoolExecutor(max_workers=workers()) as pool:
            for index, found in enumerate(pool.map(self._decode, range(len(source)))):
                if isinstance(found, str):
                    skipped.append(f"{source.name(index)} ({found})")
                    continue
                room -= found.numel()
                kept.append(index)
                sizes.append((found.shape[1], found.shape[2]))
                self._pixels.append(found if room >= 0 else None)
        self.skipped = tuple(skipped)
        if skipped:
            shown = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
            logger.warning("skipped %d of %d images that cannot be used: %s", len(skipped), len(source), shown)
        if not kept:
            raise DataError(f"none of the {len(source)} images can be used; the first is {skipped[0]}")
        self._kept = kept
        self.labels = torch.from_numpy(source.labels[kept])
        self.sizes = torch.tensor(sizes)
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self._kept)

    def _decode(self, index: int) -> Tensor | str:
        """(C, H, W) uint8, or why not."""
        try:
            image = open_cell(self._source.cell(index), self._source.folder)
            size = fitted_size(image.height, image.width, self._side, self._unit)
            if min(image.height, image.width) > self._side and derived_seed("crop", index) / 2**63 < self._crop:
                square = self._side // self._unit * self._unit
                return to_pixels(image, self._channels, (square, square))
            return _pixels(image, self._channels, size)
        except ConfigError:
            raise
        except DataError as error:
            return str(error)
        except Exception as error:  # PIL and its codecs raise anything from OSError to struct.error on damaged files
            return f"damaged: {' '.join(str(error).split())[:80]}"

    def image(self, index: int) -> Tensor:
        """(C, H, W) float32 in [-1, 1]."""
        pixels = self._pixels[index]
        found = self._decode(self._kept[index]) if pixels is None else pixels
        if isinstance(found, str):
            raise DataError(f"{self._source.name(self._kept[index])} changed while it was in use: {found}")
        return normalise(found)

    def samples(self, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        check_one_size(self.sizes, indices)
        images = [self.image(i) for i in indices.tolist()]
        return torch.stack([x.flip(-1) if flip else x for x, flip in zip(images, flips.tolist(), strict=True)])


def _pixels(image: Image, channels: int, size: tuple[int, int]) -> Tensor:
    """(channels, *size) uint8: bicubic, antialiased, nothing cropped, transparency over white."""
    import numpy as np
    from PIL import Image as images

    image = over_white(image).convert(CHANNEL_MODES[channels])
    if image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), images.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8, copy=True))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def open_any_size(
    source: str,
    channels: int,
    side: int,
    unit: int,
    split: str = "train",
    image_column: str = "image",
    label_column: str | None = "label",
    limit: int | None = None,
    crop: float = 0.0,
) -> AnySizeImages:
    """The images that `source` names (as `open_images`), each resized by `fitted_size`, or cropped (`AnySizeImages`).

    Raises DataError.
    """
    opened = open_source(source, split, image_column, label_column).first(limit)
    return AnySizeImages(opened, channels, side, unit, crop)


def check_one_size(sizes: Tensor, indices: Tensor) -> None:
    """Raises DataError for no samples, or samples of several sizes."""
    if len(indices) == 0:
        raise DataError("a batch needs at least one sample")
    found = sizes[indices].unique(dim=0)
    if len(found) > 1:
        shown = ", ".join("x".join(map(str, size)) for size in found.tolist())
        raise DataError(f"one batch holds samples of one size, these are of {shown}; group them by `sizes`")


def size_groups(sizes: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """((H, W), indices (n,)) of every size that occurs, in ascending order; indices ascending."""
    values, group = sizes.unique(dim=0, return_inverse=True)
    for k, size in enumerate(values.tolist()):
        yield (size[0], size[1]), (group == k).nonzero()[:, 0]

"""Training sets of pixels: decoded once into memory when they fit, decoded on the fly when they do not."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pliant.errors import DataError
from pliant.pictures import digit_levels, open_cell
from pliant.training.data.decode import normalise, to_pixels
from pliant.training.data.sources import Source, open_source
from pliant.training.draws import Draws

logger = logging.getLogger("pliant.training")

MEMORY_LIMIT = 2 * 1024**3
"""Bytes of decoded pixels up to which a data set is kept in memory."""


class TrainingSet(Protocol):
    """Samples by index. Labels are known without decoding."""

    labels: Tensor  # (N,) int64, CPU
    class_names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        ...

    def samples(self, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        """(B, C, H, W) float32 on the CPU for (B,) indices, mirrored left-right where (B,) bool `flips`."""
        ...


@runtime_checkable
class PairedSet(TrainingSet, Protocol):
    """Samples that come with the other end of their path."""

    def sources(self, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        """(B, C, H, W) float32 for the same arguments as `samples`: both members of a pair are mirrored together."""
        ...


class ImageSet:
    """Decoded images in memory. pixels: (N, C, H, W), uint8 0..255 or float32 in [-1, 1]."""

    def __init__(
        self, pixels: Tensor, labels: Tensor, class_names: tuple[str, ...], skipped: tuple[str, ...] = ()
    ) -> None:
        self.pixels, self.labels, self.class_names, self.skipped = pixels, labels, class_names, skipped

    def __len__(self) -> int:
        return self.pixels.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def samples(self, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        return _mirror(normalise(self.pixels[indices]), flips)


class LazyImageSet:
    """Images decoded when a batch needs them. The next readable one always stands in for a damaged one."""

    def __init__(self, source: Source, channels: int, size: tuple[int, int]) -> None:
        self._source, self._channels, self._size = source, channels, size
        self.labels = torch.from_numpy(source.labels)
        self.class_names = source.class_names
        self._damaged: set[int] = set()
        self._pool = ThreadPoolExecutor(max_workers=workers())

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the damaged images met so far."""
        return tuple(self._source.name(i) for i in sorted(self._damaged))

    def __len__(self) -> int:
        return len(self._source)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._channels, *self._size

    def samples(self, indices: Tensor, flips: Tensor, draws: Draws) -> Tensor:
        pixels = list(self._pool.map(self._readable, indices.tolist()))
        return _mirror(normalise(torch.stack(pixels)), flips)

    def _readable(self, index: int) -> Tensor:
        label = int(self.labels[index])
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            # The substitute must have the same class: the caller has already looked the label up.
            if int(self.labels[candidate]) != label or candidate in self._damaged:
                continue
            pixels = _decode(self._source, candidate, self._channels, self._size)
            if pixels is not None:
                return pixels
            self._damaged.add(candidate)
            logger.warning("skipped a damaged image: %s", self._source.name(candidate))
        raise DataError(f"no readable image of class {label}; check the data")


def _mirror(images: Tensor, flips: Tensor) -> Tensor:
    wide = flips.reshape(-1, *[1] * (images.ndim - 1))
    return torch.where(wide, images.flip(-1), images) if bool(flips.any()) else images


def workers() -> int:
    return min(16, os.cpu_count() or 1)


def _decode(source: Source, index: int, channels: int, size: tuple[int, int]) -> Tensor | None:
    """Pixels, or None if the image is damaged."""
    try:
        return to_pixels(open_cell(source.cell(index), source.folder), channels, size)
    except DataError:
        raise
    except Exception:  # PIL and its codecs raise anything from OSError to struct.error on damaged files
        return None


def decode_all(source: Source, channels: int, size: tuple[int, int]) -> ImageSet:
    """Decode into memory; damaged images are left out, counted and named. Raises DataError if all are."""
    wanted = range(len(source))
    pixels = torch.empty(len(wanted), channels, *size, dtype=torch.uint8)
    kept: list[int] = []
    skipped: list[str] = []
    with ThreadPoolExecutor(max_workers=workers()) as pool:
        for index, image in zip(wanted, pool.map(lambda i: _decode(source, i, channels, size), wanted), strict=True):
            if image is None:
                skipped.append(source.name(index))
            else:
                pixels[len(kept)] = image
                kept.append(index)
    if skipped:
        shown = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        logger.warning("skipped %d of %d images that cannot be decoded: %s", len(skipped), len(wanted), shown)
    if not kept:
        raise DataError(f"none of the {len(wanted)} images can be decoded; the first is {source.name(0)}")
    labels = torch.from_numpy(source.labels[kept])
    return ImageSet(pixels[: len(kept)], labels, source.class_names, tuple(skipped))


def digits(channels: int, size: tuple[int, int], split: str = "train") -> ImageSet:
    """The bundled digits (`pliant.pictures.digit_levels`), levels 0..16 mapped to [-1, 1]; resized if needed."""
    levels, labels = digit_levels(split)
    pixels = levels.float()[:, None] / 8.0 - 1.0
    if size != (8, 8):
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    names = tuple(str(i) for i in range(10))
    return ImageSet(pixels.expand(-1, channels, -1, -1).contiguous(), labels, names)


def open_images(
    source: str,
    channels: int,
    size: tuple[int, int],
    split: str = "train",
    image_column: str = "image",
    label_column: str | None = "label",
    limit: int | None = None,
) -> ImageSet | LazyImageSet:
    """The training set that `source` names, at the model's channels and (H, W). Raises DataError."""
    if source == "digits":
        whole = digits(channels, size, split)
        return ImageSet(whole.pixels[:limit], whole.labels[:limit], whole.class_names)
    opened = open_source(source, split, image_column, label_column).first(limit)
    if len(opened) * channels * size[0] * size[1] <= MEMORY_LIMIT:
        return decode_all(opened, channels, size)
    return LazyImageSet(opened, channels, size)

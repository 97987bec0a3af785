"""Sets of images to measure: eight-bit in memory, [-1, 1] for networks, and readers for digits, Parquet and
folders.

Every image is rounded to eight bits before it is measured, generated ones too: a number then does not depend
on whether the samples went through a file. `to_uint8(from_uint8(u)) == u` exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pliant import imaging
from pliant.errors import DataError, PliantError, ShapeError
from pliant.pictures import digit_levels, fitted, open_cell

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] (values beyond are clamped) -> uint8 of the same shape, on the CPU, rounded to nearest.

    Raises DataError for NaN: a broken sample must not become a black one.
    """
    if not images.is_floating_point():
        raise DataError(f"expected float images in [-1, 1], got {images.dtype}; uint8 images need from_uint8 first")
    return imaging.to_pixels(images)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], same shape."""
    if images.dtype != torch.uint8:
        raise DataError(f"expected uint8 images, got {images.dtype}")
    return images.float() / 127.5 - 1


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size with optional class labels.

    images: (N, C, H, W) uint8; labels: (N,) int64 or None; name: what reports call the set.
    """

    name: str
    images: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        x, y = self.images, self.labels
        if x.ndim != 4 or x.dtype != torch.uint8 or len(x) == 0:
            raise ShapeError(
                f"{self.name}: expected uint8 images (N, C, H, W) with N > 0, got {x.dtype} {tuple(x.shape)}"
            )
        if y is not None and (y.shape != x.shape[:1] or y.dtype != torch.int64):
            raise ShapeError(f"{self.name}: expected {len(x)} int64 labels, got {y.dtype} {tuple(y.shape)}")

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 batches (<= size, C, H, W) in order."""
        yield from self.images.split(size)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(images float32 in [-1, 1], labels); raises DataError without labels."""
        if self.labels is None:
            raise DataError(f"{self.name} has no labels; use a data set with a 'label' column or class folders")
        return from_uint8(self.images), self.labels

    def fingerprint(self) -> str:
        """SHA-256 over shape and pixels (labels do not enter: statistics do not see them)."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().data)
        return digest.hexdigest()


@cache
def digits(split: Literal["train", "test", "all"] = "all") -> ImageSet:
    """The bundled digits (`pliant.pictures.digit_levels`): (N, 1, 8, 8), white on black.

    Raises DataError for an unknown split, PliantError if scikit-learn is missing.
    """
    levels, labels = digit_levels(split)
    return ImageSet(f"digits ({split})", (levels / 16 * 255).round().to(torch.uint8)[:, None], labels)


def decode(data: bytes, what: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """An encoded picture -> uint8 (H, W, 3); with `size` the centre is cropped and resized (bicubic,
    antialiased).

    Raises DataError for something that is not a readable picture.
    """
    try:
        return fitted(open_cell(data), "RGB", size)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise DataError(f"{what} is not a readable image ({e}); remove or replace it") from e


def _stacked(name: str, arrays: list[np.ndarray], labels: list[int] | None) -> ImageSet:
    if not arrays:
        raise DataError(f"{name} contains no images")
    shapes = {a.shape[:2] for a in arrays}
    if len(shapes) > 1:
        raise DataError(f"{name} has images of {len(shapes)} sizes, e.g. {sorted(shapes)[:3]}; pass size=(H, W)")
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return ImageSet(name, images, None if labels is None else torch.tensor(labels, dtype=torch.int64))


def images_from_parquet(path: str | Path, size: tuple[int, int] | None = None) -> ImageSet:
    """A Hugging Face image column (`image`: {bytes, path}) with an optional integer `label` column; RGB.

    Raises DataError for a missing file, wrong columns or a broken image, PliantError if pyarrow is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected a Parquet file with an 'image' column")
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError as e:
        raise PliantError("reading Parquet needs pyarrow: pip install datasets (or pyarrow)") from e
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as e:
        raise DataError(f"{path} is not a readable Parquet file ({e})") from e
    if "image" not in table.column_names:
        raise DataError(f"{path} has the columns {table.column_names}; expected one called 'image'")
    column = table.column("image").type
    if not pyarrow.types.is_struct(column) or column.get_field_index("bytes") < 0:
        raise DataError(f"{path}: 'image' has type {column}; expected the {{bytes, path}} struct that datasets writes")
    rows = table.column("image").to_pylist()
    arrays = [decode((row or {}).get("bytes") or b"", f"{path} row {i}", size) for i, row in enumerate(rows)]
    has_labels = "label" in table.column_names and pyarrow.types.is_integer(table.column("label").type)
    labels = table.column("label").to_pylist() if has_labels else None
    if labels is not None and None in labels:
        raise DataError(f"{path}: row {labels.index(None)} has no label; fill or drop the column")
    return _stacked(path.name, arrays, labels)


def images_from_folder(path: str | Path, size: tuple[int, int] | None = None) -> ImageSet:
    """All pictures below a folder in sorted order, RGB. If every one lies in a sub-folder, the first level is
    the class.

    Raises DataError for a missing or empty folder, unreadable pictures, or mixed sizes without `size`.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is not a folder")
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    arrays = [decode(f.read_bytes(), str(f), size) for f in files]
    parents = [f.relative_to(path).parts[:-1] for f in files]
    labels = None
    if files and all(parents):
        classes = sorted({p[0] for p in parents})
        labels = [classes.index(p[0]) for p in parents]
    return _stacked(path.name, arrays, labels)

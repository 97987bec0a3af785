"""The ADM sample file (guided-diffusion): `arr_0` uint8 (N, H, W, 3), optionally `arr_1` labels, `mu` and
`sigma`.

Files are read as streams, so 50,000 images of 256x256 (9.8 GB) never have to fit in memory, and pickled
objects are never loaded.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from pliant.errors import DataError, FormatError, ShapeError
from pliant.evaluation.features import INCEPTION
from pliant.evaluation.images import ImageSet
from pliant.evaluation.statistics import FeatureStatistics
from pliant.files import replaced_file

BROKEN = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Member:
    """The header of one array in the archive."""

    shape: tuple[int, ...]
    dtype: np.dtype


def write_npz(path: str | Path, images: Tensor, labels: Tensor | None = None) -> None:
    """images: (N, C, H, W) uint8 (grey is repeated to RGB, as evaluators expect); labels: (N,) int64 as
    `arr_1`.

    Raises ShapeError.
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
        raise ShapeError(f"expected uint8 images (N, 3, H, W), got {images.dtype} {tuple(images.shape)}; see to_uint8")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ShapeError(f"expected {len(images)} labels, got {tuple(labels.shape)}")
    arrays = {"arr_0": images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()}
    if labels is not None:
        arrays["arr_1"] = labels.numpy()
    with open(path, "wb") as file:  # an open file keeps numpy from appending ".npz"
        np.savez(file, **arrays)  # type: ignore[arg-type]


@contextmanager
def _open(path: Path, key: str) -> Iterator[tuple[IO[bytes], Member]]:
    """The data stream of one array, positioned after its checked header.  Raises FormatError."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            else:
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
            if dtype.hasobject or fortran:
                raise FormatError(f"{path}: {key} is a pickled or column-major array; write it with numpy.savez")
            expected = math.prod(shape) * dtype.itemsize
            if archive.getinfo(f"{key}.npy").file_size - stream.tell() != expected:
                raise FormatError(f"{path}: {key} should hold {expected} bytes but does not; the file is damaged")
            yield stream, Member(shape, dtype)
    except FormatError:
        raise
    except BROKEN as e:
        raise FormatError(f"{path} is not a readable .npz with {key} ({e})") from e


def _keys(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {n.removesuffix(".npy") for n in archive.namelist()}
    except BROKEN as e:
        raise FormatError(f"{path} is not a readable .npz file ({e})") from e


def _array(path: Path, key: str) -> np.ndarray:
    with _open(path, key) as (stream, member):
        return np.frombuffer(stream.read(), dtype=member.dtype).reshape(member.shape)


def npz_batches(path: str | Path, size: int) -> Iterator[Tensor]:
    """uint8 batches (<= size, C, H, W) of `arr_0`, streamed.  Raises FormatError when the file is not what it
    should be.
    """
    path = Path(path)
    with _open(path, "arr_0") as (stream, member):
        if len(member.shape) != 4 or member.dtype != np.uint8 or member.shape[3] not in (1, 3) or 0 in member.shape:
            raise FormatError(f"{path}: arr_0 is {member.dtype} {member.shape}; expected uint8 (N, H, W, 3)")
        n, row = member.shape[0], member.shape[1:]
        for start in range(0, n, size):
            count = min(size, n - start)
            try:
                data = stream.read(count * math.prod(row))
            except BROKEN as e:  # e.g. a wrong checksum, found only when the end is reached
                raise FormatError(f"{path}: arr_0 is damaged ({e})") from e
            array = np.frombuffer(data, dtype=np.uint8).reshape(count, *row)
            yield torch.from_numpy(array.copy()).permute(0, 3, 1, 2).contiguous()


class NpzImages:
    """The images of an .npz as `evaluate_images` takes them, read as a stream each time.  Raises FormatError."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = self.path.name
        with _open(self.path, "arr_0") as (_, member):
            n, height, width, channels = member.shape if len(member.shape) == 4 else (0, 0, 0, 0)
        self.shape = (n, channels, height, width)
        """(N, C, H, W)."""
        next(iter(self.batches(1)), None)  # refuses what is not images

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 batches (<= size, C, H, W) in order."""
        return npz_batches(self.path, size)

    def fingerprint(self) -> str:
        """That of the same images in memory (`ImageSet`)."""
        digest = hashlib.sha256(repr(self.shape).encode())
        for images in self.batches(1024):
            digest.update(images.numpy().data)
        return digest.hexdigest()


def read_npz(path: str | Path) -> ImageSet:
    """All images, and labels from `arr_1` where they are there.  Raises FormatError."""
    path = Path(path)
    images = torch.cat(list(npz_batches(path, 1024)))
    labels = torch.from_numpy(_array(path, "arr_1").astype(np.int64)) if "arr_1" in _keys(path) else None
    return ImageSet(path.name, images, labels)


def npz_statistics(path: str | Path) -> FeatureStatistics | None:
    """The stored `mu`, `sigma`, or None. In ADM's reference files they cover the whole data set while `arr_0` is only a
    part of it (for precision and recall); ADM, pytorch-fid and clean-fid store Inception pool3 statistics under these
    names, so that is stated.

    Raises FormatError for arrays that cannot be a mean and a covariance.
    """
    return _statistics(Path(path), "mu", "sigma")


def npz_spatial_statistics(path: str | Path) -> FeatureStatistics | None:
    """ADM's `mu_s`, `sigma_s` of sFID's features, or None.  Raises FormatError."""
    return _statistics(Path(path), "mu_s", "sigma_s")


def _statistics(path: Path, mu: str, sigma: str) -> FeatureStatistics | None:
    if not {mu, sigma} <= _keys(path):
        return None
    try:
        mean, cov = (torch.from_numpy(_array(path, key).astype(np.float64)) for key in (mu, sigma))
        return FeatureStatistics(None, mean, cov, {"extractor": INCEPTION, "reference": path.name})
    except (ShapeError, DataError, TypeError) as e:
        raise FormatError(f"{path}: {mu} and {sigma} are not usable statistics ({e})") from e


def write_npz_statistics(
    path: str | Path, statistics: FeatureStatistics, spatial: FeatureStatistics | None = None
) -> None:
    """`mu` and `sigma` (and `mu_s`, `sigma_s`) as the evaluators of ADM, pytorch-fid and clean-fid read them. They are
    by convention Inception pool3's.

    Raises DataError for statistics of another extractor, which a reader could not tell apart.
    """
    if statistics.provenance.get("extractor") != INCEPTION:
        raise DataError("an .npz of mu and sigma is understood as Inception statistics; use FeatureStatistics.save")
    arrays = {"mu": statistics.mean.numpy(), "sigma": statistics.cov.numpy()}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.cov.numpy()}
    with replaced_file(path) as temporary, open(temporary, "wb") as file:  # so numpy does not append ".npz"
        np.savez(file, **arrays)  # type: ignore[arg-type]


def npz_length(path: str | Path) -> int | None:
    """How many images `arr_0` holds, or None without it.  Raises FormatError."""
    path = Path(path)
    if "arr_0" not in _keys(path):
        return None
    with _open(path, "arr_0") as (_, member):
        return member.shape[0] if member.shape else 0

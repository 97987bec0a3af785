"""Low bands of an image: what a smaller grid can hold, and the orthonormal coefficients of what it cannot.

Two bands. "haar": the low band is the mean of every block (ratios are whole numbers), the rest are the other DCT
coefficients of the block (at ratio 2 exactly the Haar details). "dct": the low band is the image's first cosine
coefficients (any smaller size), the rest are the others. With Q the orthonormal analysis of one axis of n pixels and
Q_low its first m rows, in both bands

    P = sqrt(m/n) R^T Q_low        (n -> m, R the coarse axis' own analysis: identity for blocks, cosines for "dct")
    U = (n/m) P^T                  (m -> n),           P U = 1,        P P^T = (m/n) 1

so a constant stays the constant, `U P` is an orthogonal projection, and white unit noise comes out white with standard
deviation sqrt(m/n) per axis: 1/r in two dimensions (sheet H, section 0). Bilinear resizing has none of these.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.errors import ConfigError, ShapeError, suggest

Band: TypeAlias = Literal["haar", "dct"]
BANDS: tuple[Band, ...] = get_args(Band)
Size: TypeAlias = tuple[int, int]


def check_band(band: str) -> Band:
    """`band` checked against the known ones. Raises ConfigError."""
    if band not in BANDS:
        raise ConfigError(f"unknown band {band!r}: {suggest(str(band), BANDS)}")
    return band


def coarse_size(size: Size, ratio: tuple[float, float], band: Band) -> Size:
    """The smaller grid. Raises ConfigError for ratios below 1, or that do not give whole pixels (or whole blocks)."""
    smaller = []
    for side, r in zip(size, ratio, strict=True):
        if not 1 <= r < math.inf:
            raise ConfigError(f"a scale ratio is at least 1 (2 halves the side), got {r}")
        m = round(side / r)
        if m < 1 or abs(m * r - side) > 1e-6 * side:
            raise ConfigError(f"a side of {side} pixels has no whole number of pixels at ratio {r:g}")
        if band == "haar" and side % m:
            raise ConfigError(f"band 'haar' needs a whole ratio, and {side} -> {m} is not: use band 'dct'")
        smaller.append(m)
    return smaller[0], smaller[1]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for later calls, which may want gradients
def cosines(n: int) -> Tensor:
    """(n, n) float64 orthonormal DCT-II: row k is `sqrt(2/n) cos(pi k (i + 1/2)/n)`, row 0 is `1/sqrt(n)`."""
    i = torch.arange(n, dtype=torch.float64)
    table = torch.cos(math.pi / n * i[:, None] * (i[None] + 0.5)) * math.sqrt(2.0 / n)
    table[0] = 1.0 / math.sqrt(n)
    return table


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def analysis(band: Band, n: int, m: int) -> Tensor:
    """Q, (n, n) float64 orthonormal; its first m rows span the low band.

    "haar": row j*m + b is the j-th cosine coefficient of block b.
    """
    if band == "dct":
        return cosines(n)
    if n % m:
        raise ConfigError(f"band 'haar' needs a whole ratio, and {n} -> {m} is not: use band 'dct'")
    r = n // m
    return torch.einsum("ji,bc->jbci", cosines(r), torch.eye(m, dtype=torch.float64)).reshape(n, n)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def low_pass(band: Band, n: int, m: int) -> Tensor:
    """P of one axis, (m, n) float64."""
    low = analysis(band, n, m)[:m] * math.sqrt(m / n)
    return low if band == "haar" else cosines(m).T @ low


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _matrix(kind: Literal["analysis", "low_pass"], band: Band, n: int, m: int, dtype: str, device: str) -> Tensor:
    """Analyses and low-passes where they are used: they are needed at every step."""
    table = analysis(band, n, m) if kind == "analysis" else low_pass(band, n, m)
    return table.to(device=device, dtype=getattr(torch, dtype))


def _axes(kind: Literal["analysis", "low_pass"], band: Band, full: Size, low: Size, x: Tensor) -> tuple[Tensor, Tensor]:
    dtype, device = str(x.dtype).removeprefix("torch."), str(x.device)
    rows, columns = (_matrix(kind, band, n, m, dtype, device) for n, m in zip(full, low, strict=True))
    return rows, columns


def _size(x: Tensor) -> Size:
    return x.shape[-2], x.shape[-1]


def down(x: Tensor, size: Size, band: Band) -> Tensor:
    """P x: (B, C, H, W) -> (B, C, h, w), the low band as an image of the same mean. Raises ConfigError, ShapeError."""
    full = _size(x)
    if full == size:
        return x
    _check_sizes(full, size, band)
    if band == "haar":
        return F.avg_pool2d(x, (full[0] // size[0], full[1] // size[1]))
    rows, columns = _axes("low_pass", band, full, size, x)
    return rows @ x @ columns.T


def up(y: Tensor, size: Size, band: Band) -> Tensor:
    """U y: (B, C, h, w) -> (B, C, H, W), the full-size image whose low band is y and that has nothing else."""
    low = _size(y)
    if low == size:
        return y
    _check_sizes(size, low, band)
    rh, rw = size[0] / low[0], size[1] / low[1]
    if band == "haar":
        return y.repeat_interleave(int(rh), dim=-2).repeat_interleave(int(rw), dim=-1)
    rows, columns = _axes("low_pass", band, size, low, y)
    return (rows.T * rh) @ y @ (columns * rw)


def coefficients(x: Tensor, low: Size, band: Band) -> Tensor:
    """(..., H, W) -> the same shape: orthonormal coefficients, the low band's (h, w) in the first rows and columns."""
    rows, columns = _axes("analysis", band, _size(x), low, x)
    return rows @ x @ columns.T


def from_coefficients(c: Tensor, low: Size, band: Band) -> Tensor:
    """Inverse of `coefficients`."""
    rows, columns = _axes("analysis", band, _size(c), low, c)
    return rows.T @ c @ columns


def filtered(x: Tensor, gain: Tensor, low: Size, band: Band) -> Tensor:
    """x (B, C, H, W) with every coefficient multiplied by its gain, (H, W) or (B, H, W)."""
    return from_coefficients(coefficients(x, low, band) * gain.unsqueeze(-3), low, band)


def missing_mask(size: Size, low: Size) -> Tensor:
    """(H, W) bool: which coefficients the smaller grid cannot hold."""
    mask = torch.ones(size, dtype=torch.bool)
    mask[: low[0], : low[1]] = False
    return mask


def power_in_band(power: Tensor, low: Size, band: Band) -> Tensor:
    """Power of the band's coefficients, (H, W), from the power of uncorrelated cosine coefficients, (H, W).

    Exact as a diagonal; Haar coefficients of such a field are correlated with each other, cosine ones are not.
    """
    if band == "dct":
        return power
    size = _size(power)
    rows, columns = ((analysis(band, n, m) @ cosines(n).T).square() for n, m in zip(size, low, strict=True))
    return rows @ power.to(torch.float64) @ columns.T


def _check_sizes(full: Size, low: Size, band: Band) -> None:
    check_band(band)
    if any(m > n for m, n in zip(low, full, strict=True)):
        raise ShapeError(f"the coarse grid {low} is larger than the full one {full}")
    if band == "haar" and any(n % m for m, n in zip(low, full, strict=True)):
        raise ConfigError(f"band 'haar' needs whole ratios, and {full} -> {low} has others: use band 'dct'")

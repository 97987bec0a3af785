"""Positions of tokens on the image plane.

Every patch is placed by its pixel coordinates in the original image, in units of the pre-trained patch grid, and the
usual code is evaluated there: so one code serves every patch size (FlexiDiT, arXiv 2502.20126; sheet A, 1.4).
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pliant.errors import ConfigError

PositionRule: TypeAlias = Literal["center", "corner", "own"]


def axis_coordinates(count: int, patch: int, reference: int, rule: PositionRule) -> Tensor:
    """(count,) float64 coordinates of patches of size `patch`, in units of patches of size `reference`.

    "center": the patch's centre, `(i*p + (p-p0)/2)/p0` (our decision 7.1); "corner": `i*p/p0`; "own": `i`, as if the
    coarse grid were an image of its own. All three are `i` when patch == reference.
    """
    index = torch.arange(count, dtype=torch.float64)
    if rule == "center":
        return (index * patch + (patch - reference) / 2) / reference
    if rule == "corner":
        return index * patch / reference
    if rule == "own":
        return index
    raise ConfigError(f"unknown position rule {rule!r}: use 'center', 'corner' or 'own'")


def sincos_axis(coordinates: Tensor, width: int) -> Tensor:
    """(n,) coordinates -> (n, width) code `[sin(g w_k), cos(g w_k)]`, `w_k = 10000^(-k/(width/2))`. Float64."""
    omega = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = coordinates[:, None] * omega[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_grid(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """(h,), (w,) coordinates -> (h*w, width) row-major table; the first half encodes the column (official DiT)."""
    if width % 4:
        raise ConfigError(f"a 2-D sin-cos code needs a width divisible by 4, got {width}")
    column_code = sincos_axis(columns, width // 2)[None, :, :].expand(len(rows), -1, -1)
    row_code = sincos_axis(rows, width // 2)[:, None, :].expand(-1, len(columns), -1)
    return torch.cat([column_code, row_code], dim=2).reshape(-1, width)


def patch_positions(
    grid: tuple[int, int], patch: tuple[int, int], reference: tuple[int, int], width: int, rule: PositionRule = "center"
) -> Tensor:
    """(h*w, width) float32 table for a grid of patches, in coordinates of the reference patch size."""
    rows, columns = (axis_coordinates(n, p, r, rule) for n, p, r in zip(grid, patch, reference, strict=True))
    return sincos_grid(rows, columns, width).float()

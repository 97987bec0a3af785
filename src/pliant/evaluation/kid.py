"""Kernel distance (KID when the features are Inception's): unbiased at any number of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.errors import DataError, ShapeError


def _kernel_sum(x: Tensor, y: Tensor, block: int) -> Tensor:
    """Sum over all pairs of the cubic kernel (x.y / D + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401, sec.
    4).
    """
    d = x.shape[1]
    total = torch.zeros((), dtype=torch.float64)
    for rows in x.split(block):
        for columns in y.split(block):
            total += (rows @ columns.T / d + 1).pow(3).sum()
    return total


def kernel_distance(x: Tensor, y: Tensor, block: int = 2048) -> float:
    """Unbiased squared maximum mean discrepancy over all pairs; zero on average for equal laws, so it can be
    negative.

    x: (n, D), y: (m, D) features, n and m at least 2; block: rows at a time, for memory only.
    Raises ShapeError/DataError.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ShapeError(f"expected features (n, D) and (m, D), got {tuple(x.shape)} and {tuple(y.shape)}")
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise DataError(f"the kernel distance needs at least two features on each side, got {n} and {m}")
    x, y = x.to("cpu", torch.float64), y.to("cpu", torch.float64)
    own = [_kernel_sum(v, v, block) - (v.square().sum(1) / v.shape[1] + 1).pow(3).sum() for v in (x, y)]
    return float(own[0] / (n * (n - 1)) + own[1] / (m * (m - 1)) - 2 * _kernel_sum(x, y, block) / (n * m))

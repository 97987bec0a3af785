"""Precision and recall on k-nearest-neighbour manifolds (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import DataError, ShapeError


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]. precision: samples that look real; recall: real images the samples could have
    produced.
    """

    precision: float
    recall: float


def _radii(x: Tensor, k: int, block: int) -> Tensor:
    """Distance of every row to its k-th nearest other row.  (n, D) -> (n,)."""
    return torch.cat([torch.cdist(rows, x).kthvalue(k + 1, dim=1).values for rows in x.split(block)])  # itself is 0


def _covered(points: Tensor, centres: Tensor, radii: Tensor, block: int) -> float:
    """Share of points that fall into the ball of at least one centre."""
    hits = sum(int((torch.cdist(p, centres) <= radii).any(1).sum()) for p in points.split(block))
    return hits / len(points)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, block: int = 1024) -> PrecisionRecall:
    """real: (n, D), fake: (m, D) features; k: neighbours that set each ball (3 in the paper); n, m > k.

    Depends on n and m: compare models at equal counts only.  Raises ShapeError/DataError.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ShapeError(f"expected features (n, D) and (m, D), got {tuple(real.shape)} and {tuple(fake.shape)}")
    if k < 1 or min(len(real), len(fake)) <= k:
        raise DataError(f"k = {k} neighbours need k >= 1 and more than k features, got {len(real)} and {len(fake)}")
    real, fake = real.double(), fake.double()
    return PrecisionRecall(
        precision=_covered(fake, real, _radii(real, k, block), block),
        recall=_covered(real, fake, _radii(fake, k, block), block),
    )

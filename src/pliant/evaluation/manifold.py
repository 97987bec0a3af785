"""Precision and recall on k-nearest-neighbour manifolds (Kynkäänniemi et al. 2019, arXiv 1904.06991), and density and
coverage, which outliers do not fool (Naeem et al. 2020, arXiv 2002.09797).
"""

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


@dataclass(frozen=True)
class DensityCoverage:
    """density: how many real balls a sample lies in, over the k it should (>= 0, about 1 for real data, can exceed
    it); coverage: share of real images with a sample in their ball, in [0, 1].
    """

    density: float
    coverage: float


def _radii(x: Tensor, k: int, block: int) -> Tensor:
    """Distance of every row to its k-th nearest other row.  (n, D) -> (n,)."""
    return torch.cat([torch.cdist(rows, x).kthvalue(k + 1, dim=1).values for rows in x.split(block)])  # itself is 0


def _covered(points: Tensor, centres: Tensor, radii: Tensor, block: int) -> float:
    """Share of points that fall into the ball of at least one centre."""
    hits = sum(int((torch.cdist(p, centres) <= radii).any(1).sum()) for p in points.split(block))
    return hits / len(points)


def _check(real: Tensor, fake: Tensor, k: int) -> None:
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ShapeError(f"expected features (n, D) and (m, D), got {tuple(real.shape)} and {tuple(fake.shape)}")
    if k < 1 or min(len(real), len(fake)) <= k:
        raise DataError(f"k = {k} neighbours need k >= 1 and more than k features, got {len(real)} and {len(fake)}")


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, block: int = 1024) -> PrecisionRecall:
    """real: (n, D), fake: (m, D) features; k: neighbours that set each ball (3 in the paper); n, m > k.

    Depends on n and m: compare models at equal counts only.  Raises ShapeError/DataError.
    """
    _check(real, fake, k)
    real, fake = real.double(), fake.double()
    return PrecisionRecall(
        precision=_covered(fake, real, _radii(real, k, block), block),
        recall=_covered(real, fake, _radii(fake, k, block), block),
    )


def density_coverage(real: Tensor, fake: Tensor, k: int = 5, block: int = 1024) -> DensityCoverage:
    """real: (n, D), fake: (m, D) features; k: neighbours that set the real balls (5 in the paper); n, m > k.

    Coverage of real data by itself is 1 - (1/2)^k for large sets of equal size.  Raises ShapeError/DataError.
    """
    _check(real, fake, k)
    real, fake = real.double(), fake.double()
    radii = _radii(real, k, block)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for points in fake.split(block):
        hit = torch.cdist(points, real) <= radii
        inside += int(hit.sum())
        covered |= hit.any(0)
    return DensityCoverage(inside / (k * len(fake)), float(covered.double().mean()))

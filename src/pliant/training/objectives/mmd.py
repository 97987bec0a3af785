"""Maximum mean discrepancy between two batches, with the kernel of sheet A, decision 7.3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pliant.errors import ShapeError

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def rbf_mixture(squared_distances: Tensor, median: Tensor, bandwidths: Sequence[float] = BANDWIDTHS) -> Tensor:
    """Mean of RBF kernels `exp(-d^2 / (2 (b*median)^2))` over relative bandwidths b. Any shape."""
    scaled = squared_distances / (2.0 * median.square())
    return torch.stack([torch.exp(-scaled / b**2) for b in bandwidths]).mean(0)


def mmd_squared(a: Tensor, b: Tensor, bandwidths: Sequence[float] = BANDWIDTHS, median: Tensor | None = None) -> Tensor:
    """Unbiased estimate of MMD^2 between the laws of a and b: (n, ...), (m, ...). Can be negative.

    The bandwidth unit is the median pairwise distance of the union (detached) unless given. With a
    data-dependent median the estimate is unbiased only up to the median's own noise.
    """
    if a.shape[0] < 2 or b.shape[0] < 2:
        raise ShapeError(f"MMD needs at least 2 samples on each side, got {a.shape[0]} and {b.shape[0]}")
    a, b = a.flatten(1).float(), b.flatten(1).float()
    n, m = a.shape[0], b.shape[0]
    both = torch.cat([a, b])
    squares = (both.square().sum(1)[:, None] + both.square().sum(1)[None] - 2.0 * both @ both.T).clamp(min=0.0)
    if median is None:
        rows, columns = torch.triu_indices(n + m, n + m, offset=1, device=both.device)
        median = squares.detach()[rows, columns].sqrt().median().clamp(min=1e-12)
    kernel = rbf_mixture(squares, median, bandwidths)
    aa, bb, ab = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
    within_a = (aa.sum() - aa.diagonal().sum()) / (n * (n - 1))
    within_b = (bb.sum() - bb.diagonal().sum()) / (m * (m - 1))
    return within_a + within_b - 2.0 * ab.mean()

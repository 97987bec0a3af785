"""Maximum mean discrepancy with a Gaussian kernel on unit embeddings, as CMMD measures it on CLIP's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.errors import ConfigError, DataError, ShapeError

BANDWIDTH, SCALE = 10.0, 1000.0
"""Of the paper; the scale makes readable numbers."""


def _kernel_mean(x: Tensor, y: Tensor, gamma: float, block: int) -> float:
    """Mean of exp(-gamma |x - y|^2) over all pairs."""
    total = sum(float((-gamma * torch.cdist(rows, y).square()).exp().sum()) for rows in x.split(block))
    return total / (len(x) * len(y))


def gaussian_distance(
    x: Tensor, y: Tensor, bandwidth: float = BANDWIDTH, scale: float = SCALE, block: int = 1024
) -> float:
    """scale * MMD^2 of features (n, D) and (m, D), each divided by its length; >= 0, 0 only for equal sets.

    Kernel exp(-|x - y|^2 / (2 bandwidth^2)); the biased estimator that keeps a point's pair with itself, as CMMD
    (Jayasumana et al. 2024, arXiv 2401.09603, sec. 4): its value for equal laws is about 1/n + 1/m times the spread.
    block: rows at a time, for memory only. Raises ShapeError, DataError, or ConfigError for a bandwidth <= 0.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ShapeError(f"expected features (n, D) and (m, D), got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(len(x), len(y)) < 1:
        raise DataError("the Gaussian-kernel distance needs at least one feature on each side")
    if not bandwidth > 0:
        raise ConfigError(f"the bandwidth must be positive, got {bandwidth}")
    x, y = (F.normalize(v.to("cpu", torch.float64), dim=1) for v in (x, y))
    gamma = 1 / (2 * bandwidth**2)
    own = _kernel_mean(x, x, gamma, block) + _kernel_mean(y, y, gamma, block)
    return scale * (own - 2 * _kernel_mean(x, y, gamma, block))

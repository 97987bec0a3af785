"""Linear updates as one generated kernel: every state, output and noise is read once, the new state written once.

Eager PyTorch needs one pass per term beyond the second. A generated kernel needs a compiler and seconds at its first
use per number of terms, so it is for large states (video, many images at once): docs/performance.md has the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


@cache
def _kernel(terms: int) -> Callable[..., Tensor]:
    """(coefficients (terms,), tensor 1, ..., tensor n) -> their weighted sum, for any shape."""

    def total(coefficients: Tensor, *values: Tensor) -> Tensor:
        out = coefficients[0] * values[0]
        for k in range(1, terms):
            out = out + coefficients[k] * values[k]
        return out

    # Flat and of unknown length: one kernel serves all shapes.
    return torch.compile(total, dynamic=True, fullgraph=True)


def fused_combine(terms: list[tuple[float, Tensor]], like: Tensor) -> Tensor:
    """Sum of coefficient * tensor in `like`'s shape and dtype, in one pass. Equal to `combine` but for rounding."""
    live = [(c, v) for c, v in terms if c != 0.0]
    if not live:
        return torch.zeros_like(like)
    coefficients = torch.tensor([c for c, _ in live], dtype=torch.float64).to(like.dtype).to(like.device)
    return _kernel(len(live))(coefficients, *(v.reshape(-1) for _, v in live)).view(like.shape)

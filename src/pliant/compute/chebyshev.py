"""Forecasting by ridge regression on Chebyshev polynomials of the step (Spectrum, arXiv 2603.01623)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pliant.compute.numbers import is_number, is_whole
from pliant.errors import ConfigError


@dataclass(frozen=True)
class Chebyshev:
    """A regression of kept values on T_0..T_degree of `2 clock / over - 1`, blended with a local polynomial."""

    over: float
    """What the clock runs to: the number of steps."""
    degree: int = 4
    ridge: float = 0.1
    """Penalty on all coefficients, the constant too."""
    blend: float = 1.0
    """Share of the regression, 0..1; the rest is the polynomial through the three newest values."""
    about: Literal["zero", "newest"] = "zero"
    """What is regressed: the values, which the penalty shrinks towards zero, or their distance from the newest."""

    def __post_init__(self) -> None:
        if not is_number(self.over) or self.over <= 0:
            raise ConfigError(f"chebyshev has over={self.over!r}; expected the number of steps")
        if not is_whole(self.degree) or not 0 <= self.degree <= 16:
            raise ConfigError(f"chebyshev has degree {self.degree!r}; expected a whole number from 0 to 16")
        if not is_number(self.ridge) or self.ridge <= 0:
            raise ConfigError(f"chebyshev has ridge {self.ridge!r}; expected a number > 0")
        if not is_number(self.blend) or not 0 <= self.blend <= 1:
            raise ConfigError(f"chebyshev has blend {self.blend!r}; expected a share from 0 to 1")
        if self.about not in ("zero", "newest"):
            raise ConfigError(f"chebyshev is about {self.about!r}; expected 'zero' or 'newest'")


def chebyshev_weights(at: float, nodes: Sequence[float], fit: Chebyshev, local: Sequence[float]) -> tuple[float, ...]:
    """Weights of the values at `nodes` (newest first); local: those of the newest few that the rest of the blend has.

    The forecast is linear in the kept values: `phi(at)^T (X^T X + ridge I)^-1 X^T`, in float64.
    """
    rows = _design(nodes, fit)
    normal = rows.T @ rows + fit.ridge * torch.eye(fit.degree + 1, dtype=torch.float64)
    weights = (_design([at], fit) @ torch.linalg.solve(normal, rows.T))[0]
    if fit.about == "newest":
        weights[0] += 1 - weights.sum()
    weights = fit.blend * weights
    weights[: len(local)] += (1 - fit.blend) * torch.tensor(local, dtype=torch.float64)
    return tuple(weights.tolist())


def _design(places: Sequence[float], fit: Chebyshev) -> Tensor:
    """(len(places), degree + 1): T_k of every place, by the recurrence."""
    tau = 2 * torch.tensor(list(places), dtype=torch.float64) / fit.over - 1
    columns = [torch.ones_like(tau), tau]
    while len(columns) <= fit.degree:
        columns.append(2 * tau * columns[-1] - columns[-2])
    return torch.stack(columns[: fit.degree + 1], dim=1)

"""DC-Solver's cascade regression: compensation ratios for step counts and guidance scales nobody searched (sheet D, 3).

`ratio(i; N, G)` is cubic in i/N; each of its coefficients quadratic in G/12; each of those quadratic in N/50
(arXiv 2409.03755). 36 numbers, linear in the ratio, fitted by least squares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.errors import PlanError

FIXED = 2
"""The first steps have no history to combine: their ratio is 1."""


def features(step: int, steps: int, guidance: float) -> Tensor:
    """(36,) products of (step/steps)^0..3, (guidance/12)^0..2 and (steps/50)^0..2; steps count from 1. Float64."""
    powers = [
        torch.tensor([value**k for k in range(count)], dtype=torch.float64)
        for value, count in ((step / steps, 4), (guidance / 12.0, 3), (steps / 50.0, 3))
    ]
    return torch.einsum("a,b,c->abc", *powers).flatten()


@dataclass(frozen=True)
class CascadeRegression:
    """The fitted polynomial. JSON-ready by `to_dict`."""

    coefficients: tuple[float, ...]

    @staticmethod
    def fit(searched: Mapping[tuple[int, float], Sequence[float]]) -> CascadeRegression:
        """searched: {(steps, guidance): one ratio per step}; of several step counts and scales for the polynomial to
        mean anything between them (the smallest solution is taken where it is not determined)."""
        rows, values = [], []
        for (steps, guidance), ratios in searched.items():
            if len(ratios) != steps:
                raise PlanError(f"{steps} steps need {steps} ratios, got {len(ratios)}")
            for i in range(FIXED, steps):
                rows.append(features(i + 1, steps, guidance))
                values.append(float(ratios[i]))
        if not rows:
            raise PlanError("there is nothing to fit: ratios of at least one plan of 3 or more steps are needed")
        right = torch.tensor(values, dtype=torch.float64)[:, None]
        found = torch.linalg.lstsq(torch.stack(rows), right, driver="gelsd").solution[:, 0]
        return CascadeRegression(tuple(found.tolist()))

    def predict(self, steps: int, guidance: float) -> tuple[float, ...]:
        """One ratio per step."""
        c = torch.tensor(self.coefficients, dtype=torch.float64)
        found = [float(features(i + 1, steps, guidance) @ c) for i in range(steps)]
        return tuple([1.0] * min(FIXED, steps) + found[FIXED:])

    def to_dict(self) -> dict[str, Any]:
        return {"coefficients": list(self.coefficients)}

"""Compensation ratios for step counts and guidance strengths that were never searched (DC-Solver's cascade polynomial
regression, arXiv 2409.03755; sheet D, 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import PlanError

_FIXED = 2  # the first two steps keep ratio 1
_STEPS, _GUIDANCE = 50.0, 12.0  # what the published polynomial divides by


@dataclass(frozen=True)
class RatioPolynomial:
    """Cubic in the step, quadratic in guidance and in the number of steps.

    coefficients: (4, 3, 3), `ratio_i = sum_pqr C[p,q,r] (i/N)^p (G/12)^(2-q) (N/50)^(2-r)` for step i = 1..N of N at
    guidance G; steps 1 and 2 are 1.
    """

    coefficients: Tensor

    def __post_init__(self) -> None:
        if self.coefficients.shape != (4, 3, 3):
            raise PlanError(f"coefficients are (4, 3, 3): step, guidance, count; got {tuple(self.coefficients.shape)}")

    def ratios(self, steps: int, guidance: float) -> tuple[float, ...]:
        """One ratio per step, for `DCSolver(ratios=...)`."""
        rows = _features(steps, guidance) @ self.coefficients.double().flatten()
        return (1.0,) * min(_FIXED, steps) + tuple(rows.tolist())


def fit_ratio_polynomial(found: Sequence[tuple[int, float, Sequence[float]]]) -> RatioPolynomial:
    """Least squares through searched ratios: (steps, guidance, one ratio per step) each.

    Raises PlanError unless they determine all 36 coefficients: at least three step counts and three strengths.
    """
    for steps, _, ratios in found:
        if len(ratios) != steps:
            raise PlanError(f"{steps} steps have {steps} ratios, got {len(ratios)}")
    rows = torch.cat([_features(steps, guidance) for steps, guidance, _ in found]) if found else torch.empty(0, 36)
    if len(rows) < 36 or int(torch.linalg.matrix_rank(rows)) < 36:
        raise PlanError("36 coefficients need more searches: at least 3 step counts, of 6 and more, at 3 strengths")
    values = torch.tensor([r for _, _, ratios in found for r in ratios[_FIXED:]], dtype=torch.float64)
    solution = torch.linalg.lstsq(rows, values[:, None], driver="gelsd").solution
    return RatioPolynomial(solution.reshape(4, 3, 3))


def _features(steps: int, guidance: float) -> Tensor:
    """(steps - 2, 36): what the coefficients multiply, for steps 3..N."""
    place = torch.arange(_FIXED + 1, steps + 1, dtype=torch.float64) / steps
    cubic = torch.stack([place**p for p in range(4)], 1)
    scaled = (guidance / _GUIDANCE, steps / _STEPS)
    strength, count = (torch.tensor([v * v, v, 1.0], dtype=torch.float64) for v in scaled)
    return torch.einsum("ip,q,r->ipqr", cubic, strength, count).reshape(len(place), 36)

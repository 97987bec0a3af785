"""Budgets as people write them: a fraction of full compute, or FLOPs per image.

Every planner asks the same two questions of a budget: how much may be spent (`limit`), and what a plan spends
(`spent`), both in the budget's own unit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pliant.denoiser import Denoiser
from pliant.errors import PlanError

if TYPE_CHECKING:
    from pliant.plans.plan import Plan

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}

SLACK = 5e-4
"""Budgets are met to half a tenth of a percent of full compute: a rounded "69.7 %" means what it was rounded from."""


@dataclass(frozen=True)
class Budget:
    """Exactly one of the two is set."""

    share: float | None = None
    """Of full compute, in (0, 1]."""
    flops: float | None = None
    """Per image, guidance included."""

    def spent(self, plan: Plan, model: Denoiser) -> float:
        """What a plan spends of this budget: FLOPs per image (at most, where gates decide)."""
        return plan.cost(model).flops

    def limit(self, full: Plan, model: Denoiser) -> float:
        """The most that may be spent, in the unit of `spent`; full: the plan that counts as full compute."""
        whole = self.spent(full, model)
        return (self.flops if self.flops is not None else (self.share or 1.0) * whole) + SLACK * whole

    def fits(self, plan: Plan, full: Plan, model: Denoiser) -> bool:
        """Whether a plan keeps to this budget."""
        return self.spent(plan, model) <= self.limit(full, model)

    def describe(self, amount: float, full: Plan, model: Denoiser) -> str:
        """An amount spent, for messages: `61.0% of full compute (1.2 GFLOP per image)`."""
        return f"{amount / self.spent(full, model):.1%} of full compute ({amount / 1e9:.3g} GFLOP per image)"


def parse_budget(value: float | str | Budget) -> Budget:
    """0.6, "0.6", "60%" -> share; "30 TFLOP", "1.5e9 FLOPs" -> FLOPs per image. Raises PlanError otherwise."""
    if isinstance(value, Budget):
        return value
    text = str(value).strip()
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?\d+)?)\s*(%|([kmgtp]?)flops?)?", text, flags=re.IGNORECASE)
    try:
        number = float(match.group(1)) if match else 0.0
    except ValueError:
        match, number = None, 0.0
    if not match or number <= 0:
        raise PlanError(
            f"cannot read the budget {text!r}; write a fraction (0.6), a percentage (60%) or FLOPs (30 TFLOP)"
        )
    unit = (match.group(2) or "").lower()
    if unit and unit != "%":
        return Budget(flops=number * _UNITS[match.group(3).lower()])
    share = number / 100 if unit == "%" else number
    if share > 1:
        hint = f"; did you mean {number:g}%?" if number <= 100 else ""
        raise PlanError(f"a budget of {text} is more than full compute{hint}")
    return Budget(share=share)

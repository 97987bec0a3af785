"""Budgets as people write them: a fraction of full compute, or FLOPs per image."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pliant.errors import PlanError

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}


@dataclass(frozen=True)
class Budget:
    """Exactly one of the two is set."""

    share: float | None = None
    """Of full compute, in (0, 1]."""
    flops: float | None = None
    """Per image, guidance included."""

    def limit(self, full_flops: int) -> float:
        """The most FLOPs this budget allows when full compute costs `full_flops`."""
        return self.flops if self.flops is not None else (self.share or 1.0) * full_flops


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

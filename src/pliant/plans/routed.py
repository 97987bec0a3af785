"""Several ready plans and a rule that picks one per sample: easy samples take the cheap plan.

`pliant.sample` groups samples by the plan chosen for them, so that batches stay whole, and returns them in the order
they were asked for. Image k depends on its own label, seed and plan only: grouping changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.files import write_json
from pliant.plans.plan import Plan

FORMAT, VERSION = "pliant-routed-plans", 1


@dataclass(frozen=True, eq=False)
class RoutedPlans:
    """`table[c]` is the number of the plan that class c takes; the null class (the last row) may have its own.

    A table is all that is left of a router that was trained on classes (`pliant.planning.routing`); other conditions
    are routed by giving `choose`, (labels (B,), seeds) -> (B,) plan numbers, which a file cannot hold.
    """

    plans: tuple[Plan, ...]
    table: tuple[int, ...] = ()
    choose: Callable[[Tensor, Sequence[int]], Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.plans:
            raise PlanError("routing needs at least one plan")
        if bool(self.table) == (self.choose is not None):
            raise PlanError("routing needs a table of classes, or a function that chooses; give one of them")
        bad = [p for p in self.table if not 0 <= p < len(self.plans)]
        if bad:
            raise PlanError(f"the routing table names plan {bad[0]}, but there are {len(self.plans)}")

    def route(self, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        """(B,) int64: the number of each sample's plan. Raises PlanError for a class without one."""
        if self.choose is not None:
            found = self.choose(labels, seeds).to(torch.int64).cpu()
            if found.shape != labels.shape or not bool(((found >= 0) & (found < len(self.plans))).all()):
                raise PlanError(f"the routing function must return {len(labels)} plan numbers below {len(self.plans)}")
            return found
        if int(labels.max()) >= len(self.table):
            raise PlanError(f"the routing table has {len(self.table)} classes, class {int(labels.max())} is not in it")
        return torch.tensor(self.table)[labels.cpu()]

    def groups(self, labels: Tensor, seeds: Sequence[int]) -> list[tuple[Plan, list[int]]]:
        """Each plan that is taken, with the places of its samples."""
        chosen = self.route(labels, seeds).tolist()
        return [
            (plan, [i for i, p in enumerate(chosen) if p == k]) for k, plan in enumerate(self.plans) if k in chosen
        ]

    def flops(self, model: Denoiser, labels: Tensor, seeds: Sequence[int]) -> float:
        """Mean FLOPs per image for these samples."""
        costs = torch.tensor([plan.cost(model).flops for plan in self.plans], dtype=torch.float64)
        return float(costs[self.route(labels, seeds)].mean())

    # Files --------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        if self.choose is not None:
            raise PlanError("plans that are chosen by a function cannot be written to a file; use a table of classes")
        return {
            "format": FORMAT,
            "version": VERSION,
            "table": list(self.table),
            "plans": [plan.to_dict() for plan in self.plans],
        }

    @staticmethod
    def from_dict(data: Any) -> RoutedPlans:
        """Inverse of `to_dict`. Raises PlanError."""
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise PlanError(f'these are no routed plans: expected a JSON object with "format": "{FORMAT}", version 1')
        try:
            return RoutedPlans(tuple(Plan.from_dict(p) for p in data["plans"]), tuple(int(p) for p in data["table"]))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"these routed plans are damaged: {error}") from None

    def save(self, file: str | FilePath) -> None:
        """Write as JSON, atomically."""
        write_json(file, self.to_dict())

    @staticmethod
    def load(file: str | FilePath) -> RoutedPlans:
        """Raises PlanError for a missing, unreadable or foreign file."""
        try:
            data = json.loads(FilePath(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"{file} is not readable JSON ({error})") from None
        return RoutedPlans.from_dict(data)

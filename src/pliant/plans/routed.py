"""Several ready plans and a rule that picks one per sample: easy samples take the cheap plan.

`pliant.sample` groups samples by the plan chosen for them, so that batches stay whole, and returns them in the order
they were asked for. Image k depends on its own label, seed and plan only: grouping changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.files import write_json
from pliant.plans.cost import PlanCost
from pliant.plans.plan import Plan, from_file

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
    provenance: dict[str, Any] = field(default_factory=dict)
    """How the table was found; for people."""

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

    def groups(self, labels: Tensor, seeds: Sequence[int]) -> list[tuple[int, list[int]]]:
        """The number of each plan that is taken, with the places of its samples."""
        chosen = self.route(labels, seeds).tolist()
        return [(k, [i for i, p in enumerate(chosen) if p == k]) for k in range(len(self.plans)) if k in chosen]

    def check(self, model: Denoiser) -> None:
        """Raises PlanError for a model that cannot run one of the plans."""
        for plan in self.plans:
            plan.check(model)

    def flops(self, model: Denoiser, labels: Tensor, seeds: Sequence[int]) -> float:
        """Mean FLOPs per image for these samples."""
        costs = torch.tensor([plan.cost(model).flops for plan in self.plans], dtype=torch.float64)
        return float(costs[self.route(labels, seeds)].mean())

    def cost(self, model: Denoiser, classes: Sequence[int] | None = None) -> PlanCost:
        """Of one image on average over these classes, by default all of the model; whole numbers, no list of steps.

        Raises PlanError where a function chooses (use `flops`), and for classes that the table lacks.
        """
        if not self.table:
            raise PlanError("what a function chooses has no cost before samples are named; ask `flops` with theirs")
        classes = range(model.num_classes) if classes is None else classes
        of = [plan.cost(model) for plan in self.plans]
        taken = [of[p] for p in self.route(torch.tensor(classes), ()).tolist()]

        def mean(name: str) -> int:
            return round(sum(getattr(cost, name) for cost in taken) / len(taken))

        return PlanCost(mean("flops"), mean("full_flops"), mean("evaluations"), mean("calls"), (), mean("least_flops"))

    def classes_of(self, number: int) -> str:
        """Which rows of the table take plan `number`, as in "0-2 5"; "none"."""
        runs: list[list[int]] = []
        for c in (c for c, p in enumerate(self.table) if p == number):
            if runs and runs[-1][1] == c - 1:
                runs[-1][1] = c
            else:
                runs.append([c, c])
        return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"

    def describe(self, model: Denoiser) -> str:
        """Every plan that is taken: steps, GFLOP per image, share of full compute, and its classes."""
        cost, named = self.cost(model), model.num_classes
        lines = [
            f"{len(self.plans)} plans for {named} classes: {cost.flops / 1e9:.4g} GFLOP per image on average, "
            f"{cost.share:.1%} of full compute",
            f"{'plan':12s}  {'steps':>5s}  {'GFLOP':>8s}  {'share':>6s}  classes",
        ]
        for number, plan in enumerate(self.plans):
            own, classes = plan.cost(model), self.classes_of(number)
            lines.append(
                f"{plan.digest()}  {len(plan.steps):5d}  {own.flops / 1e9:8.4g}  {own.share:6.1%}  {classes}"
            )
        return "\n".join(lines)

    def digest(self) -> str:
        """12 hex digits of what is done: the table and the plans' own digests."""
        content = json.dumps([self.to_dict()["table"], [plan.digest() for plan in self.plans]])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def with_plans(self, change: Callable[[Plan], Plan]) -> RoutedPlans:
        """The same table over changed plans."""
        return replace(self, plans=tuple(map(change, self.plans)))

    # Files --------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        if self.choose is not None:
            raise PlanError("plans that are chosen by a function cannot be written to a file; use a table of classes")
        return {
            "format": FORMAT,
            "version": VERSION,
            "provenance": self.provenance,
            "table": list(self.table),
            "plans": [plan.to_dict() for plan in self.plans],
        }

    @staticmethod
    def from_dict(data: Any) -> RoutedPlans:
        """Inverse of `to_dict`. Raises PlanError."""
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise PlanError(f'these are no routed plans: expected a JSON object with "format": "{FORMAT}", version 1')
        try:
            plans, table = tuple(map(Plan.from_dict, data["plans"])), tuple(int(p) for p in data["table"])
            return RoutedPlans(plans, table, provenance=dict(data.get("provenance") or {}))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"these routed plans are damaged: {error}") from None

    def save(self, file: str | FilePath) -> None:
        """Write as JSON, atomically."""
        write_json(file, self.to_dict())

    @staticmethod
    def load(file: str | FilePath) -> RoutedPlans:
        """Raises PlanError for a missing, unreadable or foreign file."""
        return from_file(file, RoutedPlans.from_dict)


AnyPlan: TypeAlias = Plan | RoutedPlans
"""What can be sampled with."""


def read_plan(data: Any) -> AnyPlan:
    """Either kind, from what its `to_dict` gave. Raises PlanError."""
    routed = isinstance(data, dict) and data.get("format") == FORMAT
    return RoutedPlans.from_dict(data) if routed else Plan.from_dict(data)


def load_plan(file: str | FilePath) -> AnyPlan:
    """A plan file of either kind. Raises PlanError if it is missing, not JSON, or neither."""
    return from_file(file, read_plan)

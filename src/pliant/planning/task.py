"""What every planner begins with, the budget's limit and clock, and what it ends with, a `PlanResult`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.guidance import Guidance
from pliant.planning.objective import Objective
from pliant.planning.result import Candidate, PlanResult, Progress, frontier, measured_against, planned
from pliant.plans import AnyPlan, Budget, Plan, parse_budget
from pliant.plans.presets import as_guidance
from pliant.solvers import SolverLike


@dataclass(eq=False)
class Task:
    """One call of a planner: how much may be spent, and what has been tried.

    steps, guidance: of the plan that counts as full compute; its solver has one evaluation per step.
    """

    planner: str
    model: Denoiser
    budget: Budget
    steps: int
    guidance: float | None
    objective: Objective | None
    progress: Progress | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    tried: list[Candidate] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @staticmethod
    def begin(
        planner: str,
        model: Denoiser,
        budget: float | str | Budget,
        objective: Objective | None,
        steps: int,
        guidance: float | None,
        seed: int,
        progress: Progress | None,
        **settings: Any,
    ) -> Task:
        if steps < 1:
            raise PlanError(f"the plan of full compute needs at least one step, got {steps}")
        wanted = parse_budget(budget)
        facts = {"budget": wanted.amount, "steps": steps, "guidance": guidance, "seed": seed, **settings}
        if objective is not None:
            facts["objective"] = objective.describe()
        return Task(planner, model, wanted, steps, guidance, objective, progress, facts)

    @property
    def cfg(self) -> Guidance | None:
        return as_guidance(self.guidance)

    def full(self) -> Plan:
        """The all-powerful plan that the budget's share is of."""
        return self.uniform(self.steps)

    def uniform(self, steps: int, solver: SolverLike = "dpmpp-2m", times: Sequence[float] | None = None) -> Plan:
        """A plan at full compute and guidance."""
        return Plan.uniform(self.model, steps, solver, guidance=self.guidance, times=times)

    @cached_property
    def limit(self) -> float:
        """The most that may be spent, in the budget's own unit."""
        return self.budget.limit(self.full(), self.model)

    def fits(self, plan: AnyPlan) -> bool:
        return self.budget.spent(plan, self.model) <= self.limit

    def most_steps(self, solver: SolverLike = "dpmpp-2m") -> int:
        """How many steps at full compute the budget pays for, at most `steps`. Raises PlanError if not one."""
        limit = self.limit
        one, two = (self.budget.spent(self.uniform(n, solver), self.model) for n in (1, 2))
        count = min(self.steps, int((limit - one) / (two - one) + 1 + 1e-9))
        while count > 0 and self.budget.spent(self.uniform(count, solver), self.model) > limit:
            count -= 1
        if count < 1:
            raise self.too_small(self.uniform(1, solver))
        return count

    def too_small(self, cheapest: Plan) -> PlanError:
        """The error for a budget that no plan of this planner meets."""
        least = self.budget.describe(self.budget.spent(cheapest, self.model), self.full(), self.model)
        first, count = cheapest.steps[0], len(cheapest.steps)
        guided = "" if first.guidance is None else f", {first.guidance.describe()}"
        least_call = min(self.model.flops(Compute(patch=patch)) for patch in self.model.patch_sizes)
        weaker = self.model.flops(first.compute) > least_call
        return PlanError(
            f"the budget {self.settings['budget']} is below the cheapest plan of planner {self.planner!r}, which costs "
            f"{least}: {count} step{'s' * (count != 1)}, {first.compute.describe()}{guided}; raise the budget"
            + (", or use a planner with weaker steps, such as 'weak-split'" if weaker else "")
        )

    def consider(self, plan: AnyPlan) -> Candidate:
        """Measure a plan if there is an objective, and keep it."""
        score = None if self.objective is None else self.objective(plan)
        candidate = Candidate(plan, plan.cost(self.model), score)
        self.tried.append(candidate)
        return candidate

    def consider_all(self, plans: Iterable[Plan]) -> None:
        listed = list(plans)
        for i, plan in enumerate(listed):
            self.consider(plan)
            if self.progress is not None:
                best = self.best()
                self.progress(i + 1, len(listed), "" if best.score is None else str(best.score))

    def best(self) -> Candidate:
        """The measured candidate with the least score that fits; without an objective the last one that fits."""
        affordable = [c for c in self.tried if self.fits(c.plan)]
        if not affordable:
            raise PlanError(f"planner {self.planner!r} found no plan within the budget; this is a defect")
        measured = [c for c in affordable if c.score is not None]
        if not measured:
            return affordable[-1]
        return min(measured, key=lambda c: (c.score.value if c.score else 0.0, c.cost.flops))

    def finish(self, evaluations: int = 0, **facts: Any) -> PlanResult:
        """The result: the best candidate, and the frontier of all."""
        chosen = self.best()
        name = "none" if self.objective is None else self.objective.name
        plan = measured_against(planned(chosen.plan, self.planner, name, chosen.score), self.full(), self.model)
        return PlanResult(
            plan,
            chosen.cost,
            chosen.score,
            name,
            self.planner,
            {**self.settings, **facts},
            evaluations + sum(c.score is not None for c in self.tried),
            time.perf_counter() - self.started,
            frontier(self.tried),
        )

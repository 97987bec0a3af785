"""The plans that a frontier compares: full compute, planners and baselines at a list of budgets, and the user's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.plans import Budget, Plan, parse_budget
from pliant.solvers import SolverLike

Kind = Literal["full", "planner", "baseline", "own"]


@dataclass(frozen=True)
class Entry:
    """One point of a frontier before it is measured."""

    kind: Kind
    family: str
    """Points of one family make one curve, e.g. "weak-split" or "fewer steps, ddim"."""
    budget: str
    """As the user wrote it; "" where the plan was not made for one."""
    plan: Plan


@dataclass(frozen=True)
class Skipped:
    """A combination that has no plan, and why."""

    family: str
    budget: str
    reason: str


def budgets_of(texts: Iterable[str]) -> dict[str, Budget]:
    """Budgets by what was written, in that order. Raises PlanError for one that cannot be read, or for none."""
    found = {text.strip(): parse_budget(text) for text in texts if text.strip()}
    if not found:
        raise PlanError("give at least one budget, e.g. 60%")
    return found


def most_steps(model: Denoiser, full: Plan, budget: Budget, solver: SolverLike, guidance: float | None) -> Plan | None:
    """The uniform plan of most steps at full compute that keeps to the budget; None if not even one step does."""
    limit = budget.limit(full, model)

    def fitting(steps: int) -> Plan | None:
        plan = Plan.uniform(model, steps, solver, guidance=guidance)
        return plan if budget.spent(plan, model) <= limit else None

    low, best, high = 0, None, len(full.steps)
    while low < high:  # what a plan spends grows with its steps
        middle = (low + high + 1) // 2
        plan = fitting(middle)
        low, best, high = (middle, plan, high) if plan is not None else (low, best, middle - 1)
    return best


def baselines(
    model: Denoiser,
    full: Plan,
    budgets: dict[str, Budget],
    solvers: Sequence[str | dict[str, object]],
    guidance: float | None,
) -> tuple[list[Entry], list[Skipped]]:
    """Fewer steps at full compute, with every solver at every budget."""
    entries, skipped = [], []
    for solver in solvers:
        family = f"fewer steps, {name_of(solver)}"
        for text, budget in budgets.items():
            try:
                plan = most_steps(model, full, budget, solver, guidance)
            except PlanError as error:
                skipped.append(Skipped(family, text, str(error)))
                continue
            if plan is None:
                skipped.append(Skipped(family, text, "not even one step fits"))
            else:
                entries.append(Entry("baseline", family, text, plan))
    return entries, skipped


def name_of(solver: str | dict[str, object]) -> str:
    """ "ddim", or "ddim (eta=0.5)"."""
    if isinstance(solver, str):
        return solver
    options = ", ".join(f"{k}={v}" for k, v in solver.items() if k != "name")
    return f"{solver['name']} ({options})" if options else str(solver["name"])

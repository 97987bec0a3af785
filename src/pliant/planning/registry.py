"""Planners by name. A new planner is a function, and one line here."""

from __future__ import annotations

from typing import Any, Protocol

from pliant.denoiser import Denoiser
from pliant.errors import PlanError, suggest
from pliant.planning.objective import Objective
from pliant.planning.result import PlanResult, Progress
from pliant.planning.weak_split import weak_split
from pliant.plans import Budget


class Planner(Protocol):
    """A budget to a plan. Options beyond these are the planner's own; all have defaults."""

    def __call__(
        self,
        model: Denoiser,
        budget: float | str | Budget,
        *,
        objective: Objective | None = None,
        steps: int = 50,
        guidance: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        **options: Any,
    ) -> PlanResult:
        """objective: chooses among finalists; None: the planner's own proxy, or nothing to choose. steps, guidance:
        of the all-powerful plan that counts as full compute. Raises PlanError for a budget below the cheapest plan,
        naming that."""
        ...


PLANNERS: dict[str, Planner] = {
    "weak-split": weak_split,
}


def get_planner(name: str) -> Planner:
    """A planner by name. Raises PlanError with the nearest one."""
    if name not in PLANNERS:
        raise PlanError(f"unknown planner {name!r}: {suggest(name, PLANNERS)}")
    return PLANNERS[name]

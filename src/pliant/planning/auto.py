"""`auto`: the joint search over solver, number and times of steps, patch size and exit per step, guidance and caches.

It starts from closed forms and from the winners of single techniques, varies them by evolution with a cheap
distributional objective, fits the coefficients of the best, and chooses on fresh seeds among finalists that always
include the best start: on its own objective it is never worse than the best single technique it knew.

Why not the error to the all-powerful sample: that ranks weak-first and weak-last schedules wrongly (`objective`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path as FilePath

from pliant.denoiser import Denoiser
from pliant.errors import PliantError
from pliant.planning.evolution import Rules
from pliant.planning.journal import Journal
from pliant.planning.objective import Objective, Score
from pliant.planning.openings import openings
from pliant.planning.plan_space import CACHES, SOLVERS, Menu, PlanSpace
from pliant.planning.racing import Effort, Recalled, cheaper, journal_of, search_plans
from pliant.planning.refit import refitted
from pliant.planning.relative import RelativeObjective
from pliant.planning.result import PlanResult, Progress
from pliant.planning.task import Task
from pliant.plans import Budget, Plan
from pliant.solvers import SolverLike

SINGLES_SHARE = 0.25
"""Of the time: for planners of single techniques before the joint search."""
RULES = Rules(population=12, parents=10, crossover=0.25, fresh=0.05)


def auto(
    model: Denoiser,
    budget: float | str | Budget,
    *,
    objective: Objective | None = None,
    steps: int = 50,
    guidance: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    evaluations: int = 160,
    seconds: float | None = None,
    journal: str | FilePath | None = None,
    finalists: int = 6,
    num: int | None = None,
    starts: Sequence[Plan] = (),
    planners: Sequence[str] = (),
    solvers: Sequence[SolverLike] = SOLVERS,
    caches: bool = True,
    fit: bool = True,
) -> PlanResult:
    """The best plan found within the budget.

    starts: plans to start from as well, such as other planners' winners; those over the budget are left out. planners:
    names of planners that are run first, in turn, for at most a quarter of the time. fit: try fitted coefficients on
    the first finalists (`refit`). objective: a `FrechetObjective`; None: relative to the samples of full compute, in
    features that need no trained network. The rest: `Effort`.
    """
    task = Task.begin("auto", model, budget, objective, steps, guidance, seed, progress)
    effort = Effort(evaluations, seconds, journal, finalists, num)
    task.settings.update(starts=[p.digest() for p in starts], planners=list(planners))
    judge = objective or RelativeObjective(model, task.full())
    diary = journal_of(task, effort, judge=judge.describe())
    try:
        begun = time.perf_counter()
        menu = Menu.of(model, task.cfg, solvers, CACHES if caches else ())
        known = [p for p in starts if task.fits(p)]
        known += _singles(task, planners, judge, effort, diary, seed)
        space = PlanSpace(task, menu, [])
        first = [space.encode(p) for p in [*known, *openings(task, menu)]]
        first = [c for c in first if space.spent(c) <= task.limit]
        if not first:
            raise task.too_small(cheapest(task, menu))
        space.starts = first
        spent = time.perf_counter() - begun
        best = _best(known, Recalled(cheaper(judge, num), diary))
        return search_plans(
            task,
            judge,
            space,
            space.decode,
            effort,
            seed=seed,
            initial=first,
            keep=best,
            rules=RULES,
            journal=diary,
            spent=spent,
            improve=(lambda plan: refitted(model, plan, seed)) if fit else None,
        )
    finally:
        diary.close()


def cheapest(task: Task, menu: Menu) -> Plan:
    """One step of the weakest call."""
    return Plan.uniform(task.model, 1, menu.solvers[0], menu.computes[-1])


def _singles(
    task: Task, names: Sequence[str], judge: Objective, effort: Effort, diary: Journal, seed: int
) -> list[Plan]:
    """Winners of other planners. What an interrupted search already has is not planned again."""
    from pliant.planning.registry import get_planner

    found = []
    begun = time.perf_counter()
    for name in names:
        planner = get_planner(name)
        late = effort.seconds is not None and time.perf_counter() - begun > SINGLES_SHARE * effort.seconds

        def run(planner=planner, late=late) -> dict | None:  # type: ignore[no-untyped-def, type-arg]
            if late:
                return None
            try:
                result = planner(
                    task.model,
                    task.budget,
                    objective=cheaper(judge, effort.num),
                    steps=task.steps,
                    guidance=task.guidance,
                    seed=seed,
                )
            except PliantError:  # this technique has nothing to offer at this budget
                return None
            return result.plan.to_dict()

        data = diary.noted(f"planner {name}", run)
        if data is not None:
            plan = Plan.from_dict(data)
            if task.fits(plan):
                found.append(plan)
    return found


def _best(known: Sequence[Plan], measure: Recalled) -> list[Plan]:
    """The best two of the given plans by the cheap measure: they are finalists whatever the search finds."""

    def value(plan: Plan) -> float:
        score: Score = measure(plan)
        return score.value

    return sorted(known, key=value)[:2]

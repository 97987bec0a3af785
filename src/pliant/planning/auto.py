"""`auto`: the joint search over solver, number and times of steps, patch size and exit per step, guidance and caches.

It starts from closed forms and from the winners of single techniques, varies them by evolution with a cheap
distributional objective, fits the coefficients of the best, and chooses on fresh seeds among finalists that always
include the best start: on its own objective it is never worse than the best single technique it knew.

Why not the error to the all-powerful sample: that ranks weak-first and weak-last schedules wrongly (`objective`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from random import Random
from typing import Any

from pliant.denoiser import Denoiser
from pliant.errors import PliantError
from pliant.planning.evolution import Rules, evolve
from pliant.planning.journal import Journal, key_of
from pliant.planning.objective import Objective
from pliant.planning.openings import openings
from pliant.planning.plan_space import CACHES, SOLVERS, Menu, PlanSpace
from pliant.planning.racing import SEARCH_SHARE, Effort, Recalled, cheaper, journal_of, search_plans
from pliant.planning.refit import refitted
from pliant.planning.relative import RelativeObjective
from pliant.planning.result import PlanResult, Progress
from pliant.planning.task import Task
from pliant.plans import Budget, Plan
from pliant.solvers import SolverLike

SINGLES_SHARE = 0.25
"""Of the time: for planners of single techniques before the joint search."""
STRUCTURE_SHARE = 0.6
"""Of the evaluations and the time: for structures with named solvers; the rest is for fitted ones."""
KEPT = 2
"""Best starts and best unfitted plans that are finalists in any case."""
FIT_SAMPLES, FIT_FINE = 16, 40
"""Of the fits while searching; finalists are fitted again on more."""
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
        measure = Recalled(cheaper(judge, num), diary)
        ranked = sorted(known, key=lambda plan: measure(plan).value)
        room = max(6, evaluations // 2 - len(ranked))
        first = [space.encode(p) for p in [*ranked, *openings(task, menu, room)]]
        first = [c for c in first if space.spent(c) <= task.limit]
        if not first:
            raise task.too_small(cheapest(task, menu))
        space.starts = first
        # First the structure with named solvers; then, with what is left, structures with coefficients of their own.
        share = STRUCTURE_SHARE if fit else 1.0
        prepared = time.perf_counter() - begun
        cheap = cheaper(judge, num)
        early = evolve(
            space,
            lambda candidate: cheap(space.decode(candidate)),
            max(1, round(share * evaluations)),
            seconds=None if seconds is None else share * SEARCH_SHARE * seconds,
            seed=seed,
            initial=first,
            rules=RULES,
            journal=diary,
            progress=progress,
        )
        leaders = [e.candidate for e in early.ranked]
        keep = [*ranked[:KEPT], *(space.decode(c) for c in leaders[:KEPT])]
        rest = evaluations - len(early.history)
        late = FittedSpace(space, seed)
        found = search_plans(
            task,
            judge,
            late if fit else space,
            late.decode if fit else space.decode,
            replace(effort, evaluations=max(1, rest)),
            seed=seed + 1,
            initial=[late.mark(c) for c in leaders[: max(1, rest // 2)]] if fit else leaders[:1],
            keep=keep,
            rules=RULES,
            journal=diary,
            spent=prepared + early.seconds,
            improve=(lambda plan: refitted(model, plan, seed)) if fit else None,
        )
        measured = found.settings["search"]["measured"] + (len(early.history) if fit else len(early.history) - 1)
        found.settings["search"].update(measured=measured, seconds=found.settings["search"]["seconds"] + early.seconds)
        return replace(found, evaluations=found.evaluations + len(early.history))
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


class FittedSpace:
    """The same space; a candidate stands for its plan with fitted coefficients, where it can have them."""

    def __init__(self, inner: PlanSpace, seed: int) -> None:
        self.inner, self.seed = inner, seed
        self._plans: dict[str, Plan] = {}

    def mark(self, candidate: dict[str, Any]) -> dict[str, Any]:
        return {**candidate, "fitted": FIT_SAMPLES}

    def bare(self, candidate: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in candidate.items() if k != "fitted"}

    def sample(self, rng: Random) -> dict[str, Any]:
        return self.mark(self.inner.sample(rng))

    def mutate(self, value: dict[str, Any], rng: Random) -> dict[str, Any]:
        return self.mark(self.inner.mutate(self.bare(value), rng))

    def cross(self, a: dict[str, Any], b: dict[str, Any], rng: Random) -> dict[str, Any]:
        return self.mark(self.inner.cross(self.bare(a), self.bare(b), rng))

    def repair(self, value: dict[str, Any], rng: Random) -> dict[str, Any] | None:
        found = self.inner.repair(self.bare(value), rng)
        return None if found is None else self.mark(found)

    def decode(self, candidate: dict[str, Any]) -> Plan:
        key = key_of(candidate)
        if key not in self._plans:
            plan = self.inner.decode(self.bare(candidate))
            self._plans[key] = refitted(self.inner.model, plan, self.seed, FIT_SAMPLES, fine=FIT_FINE) or plan
        return self._plans[key]

"""`auto`: the joint search over solver, number and times of steps, patch size and exit per step, guidance and caches.

In turn: closed forms and the winners of single techniques; how far guidance should go; evolution of structures with a
cheap distributional objective; the same with fitted coefficients; the best few on all of the objective's samples, their
continuous knobs turned there; the choice on fresh seeds among finalists that always include the best start. So on its
own objective it is never worse than the best single technique it knew.

Why not the error to the all-powerful sample: that ranks weak-first and weak-last schedules wrongly (`objective`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pliant.errors import PliantError
from pliant.guidance import Guidance
from pliant.planning.evolution import Rules, evolve
from pliant.planning.fitted_space import Candidate, FittedSpace, fitted, has_rows, is_fitted
from pliant.planning.journal import Journal
from pliant.planning.knobs import Knobs, pattern_search, turned
from pliant.planning.objective import Objective
from pliant.planning.openings import openings
from pliant.planning.plan_space import CACHES, SOLVERS, Menu, PlanSpace
from pliant.planning.racing import (
    SEARCH_SHARE,
    Effort,
    Recalled,
    cheaper,
    journal_of,
    measured_before,
    search_plans,
    within,
)
from pliant.planning.refit import Fitter
from pliant.planning.relative import RelativeObjective
from pliant.planning.request import Request, search_planner
from pliant.planning.result import PlanResult
from pliant.planning.task import Task
from pliant.plans import Plan
from pliant.solvers import SolverLike

SINGLES_SHARE = 0.25
"""Of the time: for planners of single techniques before the joint search."""
FITTED, KNOBS = 0.25, 0.25
"""Of the evaluations: for the best structures with fitted coefficients, and for continuous knobs."""
KNOBS_TIME = 0.2
"""Of the time, for the knobs."""
BRED = 0.3
"""Of the evaluations of structures: at least so many for what is bred from the openings."""
KEPT = 2
"""Best starts and best structures that are finalists in any case; finalists whose knobs are turned."""
FURTHER = 4
"""Measurements that ask how far guidance should go; starts that are tried with the answer."""
REFITTED = 4
"""Finalists that are fitted again, on more samples."""
FIT_SAMPLES, FIT_FINE = 16, 40
"""Of the fits while searching."""
RULES = Rules(population=12, parents=10, crossover=0.25, fresh=0.05)


@search_planner(evaluations=160)
def auto(
    request: Request,
    *,
    starts: Sequence[Plan] = (),
    planners: Sequence[str] = (),
    solvers: Sequence[SolverLike] = SOLVERS,
    caches: bool = True,
    fit: bool = True,
    knobs: bool = True,
) -> PlanResult:
    """The best plan found within the budget.

    starts: plans to start from as well, such as other planners' winners; those over the budget are left out. planners:
    names of planners that are run first, in turn, for at most a quarter of the time. fit: try fitted coefficients
    (`refit`). knobs: try how far guidance goes and where, and shifts of the times (`knobs`). objective: a
    `FrechetObjective`; None: relative to the samples of full compute, in features that need no trained network. The
    rest: `Effort`.
    """
    task = request.task("auto", fit=fit, knobs=knobs)
    task.settings.update(starts=[p.digest() for p in starts], planners=list(planners))
    judge = request.objective or RelativeObjective(task.model, task.full())
    diary = journal_of(task, request.effort, judge=judge.describe())
    try:
        begun = time.perf_counter()
        menu = (solvers, CACHES if caches else ())
        search = _Search(task, within(request.effort, judge, diary), judge, diary, request.seed, *menu, fit, knobs)
        known = [p for p in starts if task.fits(p)] + search.singles(planners)
        return search.run(known, begun)
    finally:
        diary.close()


@dataclass(eq=False)
class _Search:
    """One run of `auto`."""

    task: Task
    effort: Effort
    judge: Objective
    diary: Journal
    seed: int
    solvers: Sequence[SolverLike]
    caches: Sequence[dict[str, Any]]
    fit: bool
    knobs: bool

    def __post_init__(self) -> None:
        self.cheap = cheaper(self.judge, self.effort.num)
        self.measure = Recalled(self.cheap, self.diary)
        self.quick = Fitter(self.task.model, self.seed, FIT_SAMPLES, FIT_FINE)
        self.exact = Fitter(self.task.model, self.seed)

    def run(self, known: Sequence[Plan], begun: float) -> PlanResult:
        """All of it, from plans that are known. begun: when the clock was started."""
        trials = round(KNOBS * self.effort.evaluations) if self.knobs else 0
        fits = round(FITTED * self.effort.evaluations) if self.fit else 0
        count = max(1, self.effort.evaluations - trials - fits)
        effort = self.effort
        if effort.seconds is not None and self.knobs:
            effort = replace(effort, seconds=(1.0 - KNOBS_TIME) * effort.seconds)

        ranked = sorted(known, key=lambda plan: self.measure(plan).value)
        plans, cfg = self.opening(ranked, max(6, round((1.0 - BRED) * count) - len(ranked)))
        menu = self.menu(cfg)
        inner = PlanSpace(self.task, menu, [])
        first = self.candidates(inner, plans, known)
        if not first:
            raise self.task.too_small(cheapest(self.task, menu))
        space = FittedSpace(inner, self.quick)
        early = evolve(
            space,
            lambda candidate: self.cheap(space.decode(candidate)),
            count,
            seconds=None if effort.seconds is None else 0.6 * SEARCH_SHARE * effort.seconds,
            seed=self.seed,
            initial=first,
            rules=RULES,
            journal=self.diary,
            progress=self.task.progress,
        )
        # At least what the journal says, so that a resumed search has no more time than an undisturbed one.
        prepared = max(time.perf_counter() - begun, early.seconds + self.measure.seconds)
        # Leaders were measured already: the journal has them, so they cost nothing and may breed.
        leaders = [e.candidate for e in early.ranked][: RULES.parents]
        late = FittedSpace(inner, self.quick, 0.3 if self.fit else 0.0)
        found = search_plans(
            self.task,
            self.judge,
            late,
            late.decode,
            replace(effort, evaluations=len(leaders) + max(1, fits)),
            seed=self.seed + 1,
            initial=[*leaders, *[fitted(c) for c in leaders if not is_fitted(c)][: fits // 2]],
            keep=[*ranked[:KEPT], *(space.decode(c) for c in leaders[:KEPT])],
            rules=RULES,
            journal=self.diary,
            spent=prepared,
            improve=lambda plans, full: self.improved(plans, full, trials),
            cheap=self.cheap,
        )
        found = measured_before(found, early, len(leaders))
        facts = {**found.settings["search"], "scale": None if cfg is None else cfg.scale}
        return replace(found, settings={**found.settings, "search": facts})

    # Where it starts ------------------------------------------------------------------------------------------------

    def menu(self, cfg: Guidance | None) -> Menu:
        return Menu.of(self.task.model, cfg, self.solvers, self.caches)

    def opening(self, ranked: Sequence[Plan], room: int) -> tuple[list[Plan], Guidance | None]:
        """The starts, and about `room` plans more: closed forms, and starts, with guidance as far as it should go."""
        cfg = self.task.cfg
        closed = openings(self.task, self.menu(cfg), room)
        mostly = [p for p in [*ranked, *closed] if 2 * sum(s.guidance is not None for s in p.steps) >= len(p.steps)]
        guided = mostly[0] if mostly else None
        if cfg is None or guided is None or not self.knobs:
            return [*ranked, *closed], cfg
        _, answer = pattern_search(guided, turned, self.measure, FURTHER, least=1.0, names=("scale",))
        if answer.scale == 0.0:
            return [*ranked, *closed], cfg
        cfg = replace(cfg, scale=1.0 + 2.0**answer.scale * (cfg.scale - 1.0))
        again = [turned(p, answer) for p in ranked[:FURTHER]]
        task = replace(self.task, guidance=cfg.scale)
        further = openings(task, self.menu(cfg), max(3, room - len(again)))
        return [*ranked, *again, *further, *closed[: max(0, room - len(again) - len(further))]], cfg

    def candidates(self, space: PlanSpace, plans: Sequence[Plan], known: Sequence[Plan]) -> list[Candidate]:
        """Known plans as they are; others with rows of their own. What is over the budget is left out."""
        given = {p.digest() for p in known}
        space.starts = [space.encode(p) for p in plans]
        found = []
        for plan, candidate in zip(plans, space.starts, strict=True):
            if space.spent(candidate) <= self.task.limit:
                stale = has_rows(candidate) and plan.digest() not in given
                found.append(fitted(candidate) if stale else candidate)
        return found

    def singles(self, names: Sequence[str]) -> list[Plan]:
        """Winners of other planners. What an interrupted search already has is not planned again."""
        from pliant.planning.registry import get_planner

        task, effort, found = self.task, self.effort, []
        begun = time.perf_counter()
        for name in names:
            planner = get_planner(name)
            late = effort.seconds is not None and time.perf_counter() - begun > SINGLES_SHARE * effort.seconds

            def run(planner=planner, late=late) -> dict | None:  # type: ignore[no-untyped-def, type-arg]
                if late:
                    return None
                try:
                    result = planner(
                        task.model, task.budget, objective=self.cheap, steps=task.steps, guidance=task.guidance,
                        seed=self.seed,
                    )  # fmt: skip
                except PliantError:  # this technique has nothing to offer at this budget
                    return None
                return result.plan.to_dict()

            data = self.diary.noted(f"planner {name}", run)
            if data is not None:
                plan = Plan.from_dict(data)
                if task.fits(plan):
                    found.append(plan)
        return found

    # How it ends ----------------------------------------------------------------------------------------------------

    def improved(self, plans: Sequence[Plan], full: Recalled, trials: int) -> Iterator[Plan]:
        """Finalists fitted on more samples; then the best of all, two of different structure, with knobs turned."""
        made = list(plans)
        if self.fit:
            made += [p for p in map(self.fit_again, plans[:REFITTED]) if p is not None and self.task.fits(p)]
            yield from made[len(plans) :]
        if not trials:
            return
        best: Mapping[Any, Plan] = {structure(p): p for p in sorted(made, key=lambda p: -full(p).value)}
        chosen = list(best.values())[::-1][:KEPT]
        limit = None if self.effort.seconds is None else KNOBS_TIME * self.effort.seconds + full.seconds

        def turn(plan: Plan, knobs: Knobs) -> Plan | None:
            there = turned(plan, knobs)
            return self.fit_again(there) if any(s.solver.name == "rows" for s in there.steps) else there

        for plan in chosen:
            yield pattern_search(
                plan, turn, full, trials // len(chosen), stop=lambda: limit is not None and full.seconds > limit
            )[0]

    def fit_again(self, plan: Plan) -> Plan | None:
        def made() -> dict[str, Any] | None:
            better = self.exact(plan)
            return None if better is None else better.to_dict()

        data = self.diary.noted(f"fitted {plan.digest()}", made)
        return None if data is None else Plan.from_dict(data)


def structure(plan: Plan) -> tuple[Any, ...]:
    """What knobs leave alone: the computes, and where guidance is."""
    return tuple((s.compute, s.guidance is not None and s.guidance.against) for s in plan.steps)


def cheapest(task: Task, menu: Menu) -> Plan:
    """One step of the weakest call."""
    return Plan.uniform(task.model, 1, menu.solvers[0], menu.computes[-1])

"""What every searching planner does: evolve by a cheap measure, race the finalists by the full one, confirm the best.

Successive halving in three rungs. Many candidates are measured on few samples with common random numbers; the best few
on all of the objective's samples; the best of those on seeds that nobody has searched on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

from pliant.errors import PlanError
from pliant.planning.distribution import FrechetObjective
from pliant.planning.evolution import Evolved, Rules, Screen, Space, evolve
from pliant.planning.journal import Journal
from pliant.planning.objective import Objective, Score
from pliant.planning.relative import RelativeObjective
from pliant.planning.result import PlanResult, confirm, measured_against
from pliant.planning.task import Task
from pliant.planning.teacher import weights_of
from pliant.plans import AnyPlan, Plan

SEARCH_SHARE = 0.7
"""Of the time: for the search; the rest is for finalists."""
RULES = Rules()
LEAST_SEARCHED = 0.25
"""Of the time: for searching, where sampling full compute takes the rest."""
RACED = 3
"""Finalists that are measured on fresh seeds."""


@dataclass(frozen=True)
class Effort:
    """How much a search may do.

    evaluations, seconds: whatever comes first; seconds include the finalists' and those of sampling full compute for a
    relative measure, but a quarter is for the search in any case. journal: file that makes it resumable.
    num: samples of the cheap measure; None: a quarter of the objective's, at least twice the features' dimension.
    """

    evaluations: int = 120
    seconds: float | None = None
    journal: str | FilePath | None = None
    finalists: int = 6
    num: int | None = None

    def __post_init__(self) -> None:
        if self.evaluations < 1 or self.finalists < 1:
            raise PlanError(
                f"a search needs at least 1 evaluation and 1 finalist, got {self.evaluations} and {self.finalists}"
            )
        if self.seconds is not None and not self.seconds > 0.0:
            raise PlanError(f"a search needs some time, got {self.seconds:g} seconds")


def cheaper(objective: Objective, num: int | None = None) -> Objective:
    """The same measure on fewer samples, the first ones of the objective's; itself where it has no such thing."""
    if not isinstance(objective, FrechetObjective):
        return objective
    least = max(2 * objective.extractor.dim, objective.num // 4)
    classes = objective.model.num_classes or 1
    count = num or min(objective.num, -(-least // classes) * classes)
    if count >= objective.num:
        return objective
    if isinstance(objective, RelativeObjective):
        return objective.on_first(count)
    o = objective
    return FrechetObjective(o.model, o.reference, o.extractor, count, o.first_seed, o.batch, o.decode)


def journal_of(task: Task, effort: Effort, **about: Any) -> Journal:
    """The search's diary, which only the same search on the same model may continue."""
    if effort.journal is None:
        return Journal()
    about = {"planner": task.planner, "model": task.model.fingerprint(), **task.settings, "num": effort.num, **about}
    about["weights"] = weights_of(task.model)
    return Journal(effort.journal, about)


def within(effort: Effort, objective: Objective, journal: Journal) -> Effort:
    """The effort less what a relative measure takes to sample full compute: before the search, and on fresh seeds at
    its end. The journal keeps it, so that a resumed search has as long."""
    if effort.seconds is None or not isinstance(objective, RelativeObjective):
        return effort
    taken = 2.0 * float(journal.noted("seconds of full compute", lambda: objective.seconds))
    return replace(effort, seconds=max(LEAST_SEARCHED * effort.seconds, effort.seconds - taken))


def search_plans(
    task: Task,
    objective: Objective,
    space: Space,
    decode: Callable[[Any], Plan],
    effort: Effort,
    *,
    seed: int = 0,
    initial: Iterable[Any] = (),
    keep: Sequence[Plan] = (),
    rules: Rules = RULES,
    screen: Screen | None = None,
    journal: Journal | None = None,
    spent: float = 0.0,
    improve: Callable[[Sequence[Plan], Recalled], Iterable[Plan]] | None = None,
    cheap: Objective | None = None,
) -> PlanResult:
    """The three rungs. decode: candidate -> plan within the budget; keep: plans that are finalists in any case.

    improve: (finalists, the full measure) -> more finalists, hoped to be better. cheap: the cheap measure, where one
    with a memory is there already. spent: seconds of the effort that are gone already. What comes back was chosen on
    fresh seeds, if the objective has any; `quality` is then what was measured there.
    """
    own = journal or journal_of(task, effort)
    if journal is None:
        effort = within(effort, objective, own)
    cheap = cheap or cheaper(objective, effort.num)
    try:
        evolved = evolve(
            space,
            lambda candidate: cheap(decode(candidate)),
            effort.evaluations,
            seconds=None if effort.seconds is None else max(1e-3, SEARCH_SHARE * effort.seconds - spent),
            seed=seed,
            initial=initial,
            rules=rules,
            journal=own,
            screen=screen,
            progress=task.progress,
        )
        plans = [p for p in finalists(evolved, decode, effort, cheap, objective, keep) if task.fits(p)]
        full = Recalled(objective, own)
        if improve is not None:
            more = {p.digest(): p for p in improve(plans, full) if task.fits(p)}
            plans += [p for d, p in more.items() if d not in {p.digest() for p in plans}]
        task.objective = full
        task.consider_all(plans)
        facts = {
            "search": {
                "measured": len(evolved.history),
                "seconds": evolved.seconds,
                "stopped": evolved.stopped,
                "objective": cheap.describe(),
            },
            "finalists": len(plans),
        }
        found = task.finish(len(evolved.history), **facts)
        return _confirmed(task, found, objective, own, keep)
    finally:
        if journal is None:
            own.close()


def measured_before(found: PlanResult, early: Evolved, again: int) -> PlanResult:
    """A result that counts an earlier stage too, of which `again` candidates were looked up in the last one."""
    count = len(early.history) - again
    facts = dict(found.settings["search"])
    facts.update(measured=facts["measured"] + count, seconds=facts["seconds"] + early.seconds)
    return replace(found, settings={**found.settings, "search": facts}, evaluations=found.evaluations + count)


def finalists(
    evolved: Evolved,
    decode: Callable[[Any], Plan],
    effort: Effort,
    cheap: Objective,
    objective: Objective,
    keep: Sequence[Plan],
) -> list[Plan]:
    """The best of the search and what is kept anyway, without repetitions; fewer where time is short."""
    count = effort.finalists
    if effort.seconds is not None and cheap is not objective and evolved.history:
        each = evolved.seconds / len(evolved.history) * _ratio(objective, cheap)
        affordable = (1.0 - SEARCH_SHARE) * effort.seconds / max(each, 1e-9) - RACED - len(keep)
        count = max(2, min(count, int(affordable)))
    plans: dict[str, Plan] = {}
    for entry in evolved.ranked[:count]:
        plan = decode(entry.candidate)
        plans[plan.digest()] = plan
    for plan in keep:
        plans.setdefault(plan.digest(), plan)
    if not plans:
        _ = evolved.best  # raises, saying why
    return list(plans.values())


def _ratio(objective: Objective, cheap: Objective) -> float:
    if isinstance(objective, FrechetObjective) and isinstance(cheap, FrechetObjective):
        return objective.num / cheap.num
    return 1.0


class Recalled:
    """An objective that looks in a journal first: what an interrupted search measured is not measured again.

    plans, seconds: how many it was asked for, and what they took, also where an earlier run measured them.
    """

    def __init__(self, objective: Objective, journal: Journal) -> None:
        self.objective, self.journal = objective, journal
        self.seconds = 0.0
        self._asked: set[str] = set()

    @property
    def plans(self) -> int:
        return len(self._asked)

    @property
    def name(self) -> str:
        return self.objective.name

    def describe(self) -> dict[str, Any]:
        return self.objective.describe()

    def __call__(self, plan: AnyPlan) -> Score:
        key = {"plan": plan.digest(), "by": self.describe()}
        entry = self.journal.get(key)
        if entry is None or entry.score is None:
            begun = time.perf_counter()
            score = self.objective(plan)
            entry = self.journal.add(key, score, time.perf_counter() - begun)
        if plan.digest() not in self._asked:
            self._asked.add(plan.digest())
            self.seconds += entry.seconds
        assert entry.score is not None
        return entry.score


def _confirmed(
    task: Task,
    found: PlanResult,
    objective: Objective,
    journal: Journal,
    keep: Sequence[Plan],
) -> PlanResult:
    """The best of the first few, and of the kept ones the first, on fresh seeds."""
    if not isinstance(objective, FrechetObjective):
        return found
    ranked = sorted(task.tried, key=lambda c: c.score.value if c.score else 0.0)
    kept = {plan.digest() for plan in keep}
    raced = ranked[:RACED]
    raced += [c for c in ranked[RACED:] if c.plan.digest() in kept][:1]
    full = task.full()
    results = [
        replace(found, plan=measured_against(c.plan, full, task.model), cost=c.cost, quality=c.score) for c in raced
    ]
    return confirm(results, task.model, Recalled(objective.on_fresh_seeds(), journal), task.progress)

"""What every searching planner does: evolve by a cheap measure, race the finalists by the full one, confirm the best.

Successive halving in three rungs. Many candidates are measured on few samples with common random numbers; the best few
on all of the objective's samples; the best of those on seeds that nobody has searched on.
"""

from __future__ import annotations

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
from pliant.planning.result import Candidate, PlanResult, confirm
from pliant.planning.task import Task
from pliant.plans import Plan

SEARCH_SHARE = 0.7
"""Of the time: for the search; the rest is for finalists."""
RULES = Rules()
IMPROVED = 4
"""Finalists that `improve` is tried on."""
RACED = 3
"""Finalists that are measured on fresh seeds."""


@dataclass(frozen=True)
class Effort:
    """How much a search may do.

    evaluations, seconds: whatever comes first; seconds include the finalists'. journal: file that makes it resumable.
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
    facts = {k: v for k, v in task.settings.items() if k not in ("evaluations", "seconds")}
    about = {"planner": task.planner, "model": task.model.fingerprint(), **facts, "num": effort.num, **about}
    return Journal(effort.journal, about)


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
    improve: Callable[[Plan], Plan | None] | None = None,
) -> PlanResult:
    """The three rungs. decode: candidate -> plan within the budget; keep: plans that are finalists in any case.

    improve: a plan that costs no more and is hoped to be better, tried on the first few finalists; None: there is none.
    spent: seconds of the effort that are gone already. What comes back was chosen on fresh seeds, if the objective has
    any; `quality` is then what was measured there.
    """
    own = journal or journal_of(task, effort)
    cheap = cheaper(objective, effort.num)
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
        plans = finalists(evolved, decode, effort, cheap, objective, keep)
        if improve is not None:
            plans += _improved(plans, improve, task, own)
        full = Recalled(objective, own)
        tried = [Candidate(plan, plan.cost(task.model), full(plan)) for plan in plans]
        task.tried.extend(tried)
        task.objective = objective
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
        return _confirmed(task, found, objective, own, tried, keep)
    finally:
        if journal is None:
            own.close()


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


def _improved(
    plans: Sequence[Plan], improve: Callable[[Plan], Plan | None], task: Task, journal: Journal
) -> list[Plan]:
    """What `improve` makes of the first few, if it keeps to the budget and is not there already."""
    known, found = {p.digest() for p in plans}, []
    for plan in plans[:IMPROVED]:

        def made(plan: Plan = plan) -> Any:
            better = improve(plan)
            return None if better is None else better.to_dict()

        data = journal.noted(f"improved {plan.digest()}", made)
        better = None if data is None else Plan.from_dict(data)
        if better is not None and better.digest() not in known and task.fits(better):
            known.add(better.digest())
            found.append(better)
    return found


def _ratio(objective: Objective, cheap: Objective) -> float:
    if isinstance(objective, FrechetObjective) and isinstance(cheap, FrechetObjective):
        return objective.num / cheap.num
    return 1.0


class Recalled:
    """An objective that looks in a journal first: what an interrupted search measured is not measured again."""

    def __init__(self, objective: Objective, journal: Journal) -> None:
        self.objective, self.journal = objective, journal

    @property
    def name(self) -> str:
        return self.objective.name

    def describe(self) -> dict[str, Any]:
        return self.objective.describe()

    def __call__(self, plan: Plan) -> Score:
        key = {"plan": plan.digest(), "by": self.describe()}
        entry = self.journal.get(key)
        if entry is None or entry.score is None:
            entry = self.journal.add(key, self.objective(plan), 0.0)
        assert entry.score is not None
        return entry.score


def _confirmed(
    task: Task,
    found: PlanResult,
    objective: Objective,
    journal: Journal,
    tried: Sequence[Candidate],
    keep: Sequence[Plan],
) -> PlanResult:
    """The best of the first few, and of the kept ones the first, on fresh seeds."""
    if not isinstance(objective, FrechetObjective):
        return found
    ranked = sorted(tried, key=lambda c: c.score.value if c.score else 0.0)
    kept = {plan.digest() for plan in keep}
    raced = ranked[:RACED]
    raced += [c for c in ranked[RACED:] if c.plan.digest() in kept][:1]
    results = [replace(found, plan=c.plan, cost=c.cost, quality=c.score) for c in raced]
    return confirm(results, task.model, Recalled(objective.on_fresh_seeds(), journal))

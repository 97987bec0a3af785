"""Weak steps first, powerful steps last: FlexiDiT's split in closed form (arXiv 2502.20126; sheet A, 1.7 and 1.8)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from pliant.errors import PlanError
from pliant.planning.request import Request, planner
from pliant.planning.result import PlanResult
from pliant.planning.task import Task
from pliant.plans import Plan, weak_to_powerful
from pliant.plans.presets import fewest_weak
from pliant.solvers import SolverLike

AIM, MOST_WEAK, LEAST = 12, 0.8, 4
"""Without an objective: the number of steps aimed at, the largest share of them that is weak, and the number below
which that share does not matter. Distance to full compute's samples, guidance 1.5, CIFAR model (48 images) at 5, 12, 40
and 60 %: 1.3, .31, .03 and .004 where this aims, 2.0, .49, .26 and .21 where about half are weak, 3.8 with all weak at
5 %; digits (256; 128) at 4 and 50 %: .18 and .001, where about half are weak .52 and .02 (docs/planning.md)."""


@planner
def weak_split(
    request: Request,
    *,
    solver: SolverLike = "dpmpp-2m",
    counts: Sequence[int] | None = None,
) -> PlanResult:
    """The fewest weak steps that meet the budget, for every number of steps in `counts`.

    counts: default: up to eight numbers between where no step need be weak and where all must be, at most `steps`. With
    guidance every split is tried with powerful steps guided by the unconditional call, and with half and all of them
    guided by the weak call (cheaper, so fewer weak steps). With an objective the best is taken; without one, plain
    guidance and about `AIM` steps, weak ones only as far as the budget asks for them: nothing is sampled.
    """
    task = request.task("weak-split", solver=str(solver))
    if counts is None:
        counts = _counts(task, solver)
    plans = []
    for count in counts:
        for between in sorted({0, count // 2, count} if task.cfg is not None and task.objective else {0}):
            plan = split(task, count, between, solver)
            if plan is not None:
                plans.append(plan)
    if not plans:
        fewest = min(counts)
        all_weak = weak_to_powerful(task.model, fewest, weak_steps=fewest, solver=solver, guidance=task.guidance)
        raise task.too_small(all_weak)
    if task.objective is None:
        plans = [_unmeasured(plans)]
    task.consider_all(plans)
    return task.finish(counts=list(counts))


def _unmeasured(plans: Sequence[Plan]) -> Plan:
    """The split to be taken where nothing is measured: a second-order solver gains little by more than `AIM` steps, so
    what would buy more makes steps powerful. Fewer than `LEAST` are bad whatever they are.
    """
    def rank(plan: Plan) -> tuple[int, int]:
        return abs(len(plan.steps) - AIM), -len(plan.steps)

    mixed = [p for p in plans if p.provenance["weak_steps"] <= MOST_WEAK * len(p.steps)]
    chosen = min(mixed, key=rank, default=None)
    return min(plans, key=rank) if chosen is None or len(chosen.steps) < LEAST else chosen


def split(task: Task, count: int, between: int, solver: SolverLike) -> Plan | None:
    """The plan of `count` steps with the fewest weak ones within the task's limit; None if there is none.

    between: how many of the powerful steps, the earliest, are guided by the weak call.
    """
    def plan(weak: int) -> Plan:
        return weak_to_powerful(
            task.model, count, weak_steps=weak, weak_guidance_steps=between, solver=solver, guidance=task.guidance
        )

    weak = fewest_weak(count, lambda weak: task.fits(plan(weak)))
    return None if weak is None else plan(weak)


def _counts(task: Task, solver: SolverLike) -> list[int]:
    """Up to eight numbers of steps, evenly spaced, from all powerful to all weak."""
    limit = task.limit

    def cost(count: int) -> float:
        plan = weak_to_powerful(task.model, count, weak_steps=count, solver=solver, guidance=task.guidance)
        return task.budget.spent(plan, task.model)

    try:
        low = task.most_steps(solver)
    except PlanError:
        low = 1
    # The first number of weak steps that is too many, less one.
    high = max(low, low + bisect_left(range(low + 1, task.steps + 1), True, key=lambda count: cost(count) > limit))
    span = high - low
    return sorted({low + round(span * k / 7) for k in range(8)})

"""Plans in closed form that spend a budget, each in its own way: where a joint search starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from typing import Any, TypeAlias

from pliant.compute import Compute
from pliant.errors import PliantError
from pliant.guidance import Guidance, weak_scale
from pliant.planning.plan_space import Menu
from pliant.planning.task import Task
from pliant.plans import Plan, Step
from pliant.plans.guiding import computed_every
from pliant.plans.times import Times
from pliant.solvers import Solver

Layout: TypeAlias = Callable[[int], Plan]
"""Number of steps -> plan."""

SHIFTS = (0.5, 2.0, 3.0)
WEAK_SHARES = (0.3, 0.5, 0.7, 1.0)
INTERVALS = ((0.0, 0.0), (0.0, 0.5), (0.5, 1.0), (0.25, 0.75), (0.1, 0.4))
"""Guided steps, as shares of their number: none, the noisy half, the clean half, the middle."""
SCALES = (2.0, 0.5, 4.0)
"""Of how far guidance goes, times what was asked for."""


def openings(task: Task, menu: Menu, most_plans: int | None = None) -> list[Plan]:
    """The most steps that the budget pays for in every layout that this model and path can run; no two alike.

    most_plans: so many at most, from every kind of layout in turn.
    """
    plans: dict[str, Plan] = {}
    turns = zip_longest(*layouts(task, menu))
    for layout in (each for turn in turns for each in turn if each is not None):
        if most_plans is not None and len(plans) >= most_plans:
            break
        plan = most(task, layout)
        if plan is not None:
            plans.setdefault(plan.digest(), plan)
    return list(plans.values())


def most(task: Task, layout: Layout) -> Plan | None:
    """The plan with the most steps (at most the task's) that fits, by bisection; None if none does or can run."""
    low, high, found = 1, task.steps, None
    while low <= high:
        count = (low + high) // 2
        try:
            plan = layout(count)
            fits = task.fits(plan)
        except PliantError:
            # A rule may need a few steps, such as an interval of guidance that some step must fall in.
            low = count + 1
            continue
        if fits:
            found, low = plan, count + 1
        else:
            high = count - 1
    return found


def layouts(task: Task, menu: Menu) -> list[list[Layout]]:
    """By kind: solvers, weak steps first, guidance, cheaper references, times, caches."""
    model, cfg, solver = task.model, task.cfg, menu.solvers[0]

    def uniform(solver: Solver, guidance: Guidance | None, times: Times = None) -> Layout:
        return lambda n: Plan.uniform(model, n, solver, guidance=guidance, times=times)

    def weak(compute: Compute, share: float, guidance: Guidance | None) -> Layout:
        return lambda n: weak_first(Plan.uniform(model, n, solver, guidance=guidance), compute, share)

    def part(interval: tuple[float, float]) -> Layout:
        return lambda n: guided_part(Plan.uniform(model, n, solver, guidance=cfg), *interval)

    def every(guidance: Guidance, period: int) -> Layout:
        return lambda n: computed_every(Plan.uniform(model, n, solver, guidance=guidance), guidance, period).noting(
            guiding={"name": "every", "period": period}
        )

    def cached(cache: dict[str, Any]) -> Layout:
        return lambda n: Plan.uniform(model, n, solver, guidance=cfg).cached(model, **cache)

    weaker = menu.computes[1:]
    solvers = [uniform(each, cfg) for each in menu.solvers]
    splits = [weak(c, share, cfg) for share in WEAK_SHARES for c in weaker]
    times = [uniform(solver, cfg, {"name": "shifted", "shift": shift}) for shift in SHIFTS]
    guided, references = list[Layout](), list[Layout]()
    if cfg is not None:
        guided += [part(interval) for interval in INTERVALS]
        guided += [uniform(solver, replace(cfg, scale=1.0 + factor * (cfg.scale - 1.0))) for factor in SCALES]
        references += [every(cfg, period) for period in (2, 3)]
        for c in weaker:
            references.append(uniform(solver, Guidance.weak_model(weak_scale(cfg.scale), c)))
            references.append(uniform(solver, replace(cfg, compute=c)))
    caches = [cached(cache) for cache in menu.caches if cache is not None]
    return [solvers, splits, guided, references, times, caches]


def guided_part(plan: Plan, first: float, last: float) -> Plan:
    """Guidance only at the steps whose number lies in these shares of all."""
    n = len(plan.steps)
    return plan.with_steps(
        replace(s, guidance=s.guidance if first * n <= k < last * n else None) for k, s in enumerate(plan.steps)
    ).noting(guiding={"name": "steps", "first": first, "last": last})


def weak_first(plan: Plan, weak: Compute, share: float) -> Plan:
    """The first steps weak, their references no stronger."""
    count = round(share * len(plan.steps))

    def weakened(step: Step) -> Step:
        g = step.guidance
        return replace(step, compute=weak, guidance=None if g is None else replace(g, compute=None))

    steps = (weakened(s) if k < count else s for k, s in enumerate(plan.steps))
    return plan.with_steps(steps).noting(preset="weak-first", weak_steps=count)

"""Plans in closed form that spend a budget, each in its own way: where a joint search starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

from pliant.errors import PliantError
from pliant.guidance import Guidance, weak_scale
from pliant.planning.plan_space import Menu
from pliant.planning.task import Task
from pliant.plans import Plan
from pliant.plans.guiding import computed_every

Layout: TypeAlias = Callable[[int], Plan]
"""Number of steps -> plan."""

SHIFTS = (0.5, 2.0, 3.0)
WEAK_SHARES = (0.3, 0.5, 0.7, 1.0)
INTERVALS = ((0.0, 0.0), (0.0, 0.5), (0.5, 1.0), (0.25, 0.75), (0.1, 0.4))
"""Guided steps, as shares of their number: none, the noisy half, the clean half, the middle."""


def openings(task: Task, menu: Menu) -> list[Plan]:
    """The most steps that the budget pays for in every layout that this model and path can run; no two alike."""
    plans: dict[str, Plan] = {}
    for layout in layouts(task, menu):
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


def layouts(task: Task, menu: Menu) -> Iterator[Layout]:
    """Each technique by itself, and the pairs that are usually good together."""
    model, cfg, solver = task.model, task.cfg, menu.solvers[0]
    weak = menu.computes[1:]
    for each in menu.solvers:
        yield lambda n, each=each: Plan.uniform(model, n, each, guidance=cfg)  # type: ignore[misc]
    for shift in SHIFTS:
        times = {"name": "shifted", "shift": shift}
        yield lambda n, times=times: Plan.uniform(model, n, solver, guidance=cfg, times=times)  # type: ignore[misc]
    references: list[Guidance | None] = [cfg]
    if cfg is not None:
        for interval in INTERVALS:
            yield lambda n, i=interval: guided_part(Plan.uniform(model, n, solver, guidance=cfg), *i)  # type: ignore[misc]
        for period in (2, 3):
            yield lambda n, p=period: computed_every(  # type: ignore[misc]
                Plan.uniform(model, n, solver, guidance=cfg), cfg, p
            )
        for compute in weak:
            references.append(replace(cfg, compute=compute))
            references.append(Guidance.weak_model(weak_scale(cfg.scale), compute))
    for reference in references[1:]:
        yield lambda n, g=reference: Plan.uniform(model, n, solver, guidance=g)  # type: ignore[misc]
    for compute in weak:
        for share in WEAK_SHARES:
            for reference in references:
                if reference is None or reference.against == "null":
                    yield lambda n, c=compute, s=share, g=reference: weak_first(  # type: ignore[misc]
                        Plan.uniform(model, n, solver, guidance=g), c, s
                    )
    for cache in menu.caches:
        if cache is not None:
            yield lambda n, c=cache: Plan.uniform(model, n, solver, guidance=cfg).cached(model, **c)  # type: ignore[misc]


def guided_part(plan: Plan, first: float, last: float) -> Plan:
    """Guidance only at the steps whose number lies in these shares of all."""
    n = len(plan.steps)
    return plan.with_steps(
        replace(s, guidance=s.guidance if first * n <= k < last * n else None) for k, s in enumerate(plan.steps)
    )


def weak_first(plan: Plan, weak: object, share: float) -> Plan:
    """The first steps weak, their references no stronger."""
    count = round(share * len(plan.steps))

    def weakened(step):  # type: ignore[no-untyped-def]
        g = step.guidance
        return replace(step, compute=weak, guidance=None if g is None else replace(g, compute=None))

    return plan.with_steps(weakened(s) if k < count else s for k, s in enumerate(plan.steps))

"""OLSS as a planner: coefficients by least squares, on the default grid, on OLSS's path and on OptimalSteps' grid."""

from __future__ import annotations

from itertools import pairwise

import torch

from pliant.planning.dynamic_programming import Route
from pliant.planning.least_squares import fit_rows, subspace_path
from pliant.planning.propagation import optimal_steps
from pliant.planning.request import Request, planner
from pliant.planning.result import PlanResult
from pliant.planning.searching import NODES, SAMPLES, Search, plan_of, prepare
from pliant.planning.task import Task
from pliant.plans import Plan, Step
from pliant.solvers import Rows


@planner
def olss(
    request: Request,
    *,
    nodes: int = NODES,
    samples: int = SAMPLES,
    ridge: float = 1e-5,
) -> PlanResult:
    """As many full steps as the budget pays for, with fitted coefficients (`pliant.planning.least_squares`).

    Plain "ddim" and "dpmpp-2m" are measured as well and kept where the fit does not help on other seeds. Calls: one
    per node for the path, steps * nodes for OptimalSteps' grid, one per step for each fit.
    """
    task = request.task("olss", ridge=ridge)
    count = task.most_steps()
    search = prepare(task, request.seed, max(nodes, count), samples)
    last = len(search.field.nodes) - 1
    at_teacher = torch.stack([search.field.output(search.teacher.states[k], k) for k in range(last)])
    routes = {
        "even": Route(tuple(round(last * k / count) for k in range(count + 1)), (0,) * count, float("nan")),
        "subspace": subspace_path(search.teacher, at_teacher, count),
        "optimal-steps": optimal_steps(search.field, search.teacher, count),
    }
    fitted = {name: fitted_plan(task, search, route, ridge) for name, route in routes.items()}
    task.consider_all([task.uniform(count, "ddim"), task.uniform(count), *fitted.values()])
    return task.finish(searched={name: p.digest() for name, p in fitted.items()})


def fitted_plan(task: Task, search: Search, route: Route, ridge: float) -> Plan:
    """The route with a fitted row for every step, all in mode 0."""
    targets = [search.teacher.states[there] for _, there in pairwise(route.places)]
    found = fit_rows(
        search.field.output, search.field.nodes, route.places, search.start, targets, task.model.prediction, ridge
    )
    plan = plan_of(task, search, route, "ddim")
    steps = [_with_solver(step, row) for step, row in zip(plan.steps, found.steps, strict=True)]
    return plan.with_steps(steps)


def _with_solver(step: Step, solver: Rows) -> Step:
    return Step(step.t, solver, step.compute, step.guidance)

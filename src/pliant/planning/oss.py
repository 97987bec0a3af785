"""OptimalSteps (arXiv 2503.21774; sheet H, 8): times chosen with the student's own states."""

from __future__ import annotations

from pliant.planning.propagation import optimal_steps
from pliant.planning.request import Request, planner
from pliant.planning.result import PlanResult
from pliant.planning.searching import NODES, SAMPLES, plan_of, prepare
from pliant.planning.stepping import SOLVER_OF_ORDER


@planner
def oss(
    request: Request,
    *,
    nodes: int = NODES,
    samples: int = SAMPLES,
    orders: tuple[int, ...] = (1, 2),
) -> PlanResult:
    """As many full steps as the budget pays for, at times searched with first-order steps, and with second-order ones.

    The paper's search is order 1. Carrying the last output along makes it work for "dpmpp-2m" too, whose best times are
    others: on the two-bump toy at 8 steps the error falls from .051 (times of order 1) to .008. Calls: for every order
    steps * nodes.
    """
    task = request.task("oss", orders=list(orders))
    count = task.most_steps()
    search = prepare(task, request.seed, max(nodes, count), samples)
    plans = []
    for k, order in enumerate(orders):
        if request.progress is not None:
            request.progress(k, len(orders), f"propagating order {order}")
        route = optimal_steps(search.field, search.teacher, count, order)
        plans.append(plan_of(task, search, route, SOLVER_OF_ORDER[order]))
    task.consider_all([task.uniform(count, SOLVER_OF_ORDER[order]) for order in orders])
    task.consider_all(plans)
    task.settings["searched"] = [{"times": p.times, "digest": p.digest()} for p in plans]
    return task.finish()

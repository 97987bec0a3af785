"""BOSS (arXiv 2312.16414; sheet C, 6): the times whose single steps from the teacher's states are best."""

from __future__ import annotations

from pliant.planning.dynamic_programming import shortest_path
from pliant.planning.edges import edge_costs
from pliant.planning.request import Request, planner
from pliant.planning.result import PlanResult
from pliant.planning.searching import NODES, SAMPLES, SOLVERS, consider_routes, prepare


@planner
def boss(
    request: Request,
    *,
    nodes: int = NODES,
    samples: int = SAMPLES,
) -> PlanResult:
    """As many full steps as the budget pays for, at the times of the shortest path through one-step errors.

    One teacher run and one call per node. Errors do not travel in this cost, which is why the default grid is measured
    too and kept where it is better (at 2 and 3 steps it often is).
    """
    return one_step_times("boss", 1.0, request, nodes, samples)


def one_step_times(name: str, discount: float, request: Request, nodes: int, samples: int) -> PlanResult:
    """The planner that BOSS and GITS are: they differ in how much later errors count."""
    task = request.task(name, discount=discount)
    count = task.most_steps()
    search = prepare(task, request.seed, max(nodes, count), samples)
    cost = edge_costs(search.field, search.teacher)
    consider_routes(task, search, [shortest_path(cost, count, discount)], SOLVERS)
    return task.finish()

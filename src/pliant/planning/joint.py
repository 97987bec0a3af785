"""Times, compute and guidance of every step from one search: `JointSearch` on a model (sheet H, 8 and 9.3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pliant.compute import Compute
from pliant.errors import PlanError
from pliant.guidance import Guidance, weak_scale
from pliant.planning.dynamic_programming import budgeted_path
from pliant.planning.edges import edge_costs
from pliant.planning.field import Mode
from pliant.planning.joint_search import JointSearch, weak_first
from pliant.planning.polish import Walker, polished
from pliant.planning.propagation import growth
from pliant.planning.request import Request, planner
from pliant.planning.result import PlanResult, Progress
from pliant.planning.searching import plan_of, prepare
from pliant.planning.stepping import SOLVER_OF_ORDER, check_order
from pliant.planning.task import Task
from pliant.plans import Plan, weakest
from pliant.solvers import SolverLike

LABELS = 64
"""Ways kept per node by the path through one-step errors."""


@planner
def joint(
    request: Request,
    *,
    nodes: int = 30,
    samples: int = 24,
    orders: Sequence[int] = (2,),
    modes: Sequence[Mode] | None = None,
    sweeps: int = 5,
    finalists: int = 2,
    trials: int = 30,
) -> PlanResult:
    """The number of steps, their times, and each step's patch size and guidance, within the budget.

    Two searches: the path through one-step errors, weighed by how much of them arrives (`budgeted_path`; BOSS with
    modes and money), and the student's own state (`JointSearch`), which is usually much better.

    With guidance and a given objective the unguided teacher is followed too, and the objective decides: distances to
    data often prefer less guidance. Pass `modes` to keep all steps guided.

    modes: what steps may use; default: `modes_of`. Searched with steps of every order in `orders`, once in any order of
    modes and once weak modes first (the error to the teacher's samples misjudges the order of computes). The nearest
    `finalists` of every search, the first of them after `trials` small changes (`polished`), are measured by the
    objective, which should be a distributional one. Calls: about nodes * modes per sweep on `samples` images, many of
    them remembered from earlier sweeps, and half a plan's per change.
    """
    task = request.task("joint", orders=list(orders))
    for order in orders:
        check_order(order)
    model, progress = task.model, task.progress
    modes = tuple(modes or modes_of(task))
    solver = SOLVER_OF_ORDER[max(orders)]  # of the same FLOPs, sums of more terms take longer
    price = [_price(task, mode, solver) for mode in modes]
    # What a plan spends besides its steps: nothing of FLOPs, a little of seconds.
    beside = task.budget.spent(_few(task, modes[0], 1, solver), model) - price[0]
    limit = task.limit - max(0.0, beside)
    if min(price) > limit:
        raise task.too_small(_few(task, modes[price.index(min(price))], 1, solver))
    # A distance to data may prefer less guidance: then the unguided teacher's path is the one to follow.
    teachers = [True, False] if request.objective is not None and task.cfg is not None else [True]
    patches = weak_first([float(model.flops(mode.compute)) for mode in modes])
    variants = [(order, phases) for order in orders for phases in dict.fromkeys([(0,) * len(modes), patches])]
    total = len(teachers) * len(variants) * sweeps
    calls, done, plans = 0, 0, list[Plan]()
    for guided in teachers:
        search = prepare(task, request.seed, nodes, samples, modes, guided)
        weight = growth(search.field, search.teacher)
        table = torch.stack([edge_costs(search.field, search.teacher, mode) for mode in range(len(modes))])
        additive = budgeted_path(table * weight, price, limit, LABELS)
        calls += nodes * (2 + len(modes))
        plans += [plan_of(task, search, additive, SOLVER_OF_ORDER[order]) for order in orders]
        for order, phases in variants:
            found = JointSearch(search.field, search.teacher, price, order, phases, weight)
            report = None if progress is None else _shifted(progress, done, total)
            routes = found.within(limit, sweeps, report)[:finalists]
            walker = Walker(search.field, search.teacher, order)
            routes[0] = polished(walker, routes[0], price, limit, phases, trials, request.seed)
            calls, done = calls + found.calls + walker.calls, done + sweeps
            plans += [plan_of(task, search, route, SOLVER_OF_ORDER[order]) for route in routes]
    task.consider_all([*_defaults(task), *{p.digest(): p for p in plans}.values()])
    return task.finish(searched=[p.digest() for p in plans], calls=calls * samples, price=price)


def modes_of(task: Task) -> list[Mode]:
    """Full compute first; then, where the model and guidance allow it: no guidance, weak-model guidance, weak steps."""
    model, full = task.model, task.cfg
    modes = [Mode(Compute(), full)]
    if full is not None:
        modes.append(Mode(Compute()))
    if len(model.patch_sizes) > 1:
        weak = weakest(model)
        if full is not None and task.guidance is not None:
            modes.append(Mode(Compute(), Guidance.weak_model(weak_scale(task.guidance), weak)))
            modes.append(Mode(weak))
        modes.append(Mode(weak, full))
    return modes


def _price(task: Task, mode: Mode, solver: SolverLike) -> float:
    """What one more step of a mode spends, in the budget's unit; one in the middle, of the solver's full order."""
    less, more = (task.budget.spent(_few(task, mode, count, solver), task.model) for count in (2, 3))
    return more - less


def _few(task: Task, mode: Mode, steps: int, solver: SolverLike) -> Plan:
    return Plan.uniform(task.model, steps, solver, mode.compute, mode.guidance)


def _defaults(task: Task) -> list[Plan]:
    """What the search must beat: the default grid at full compute, where the budget pays for a step of it."""
    try:
        return [task.uniform(task.most_steps(), solver) for solver in SOLVER_OF_ORDER.values()]
    except PlanError:
        return []


def _shifted(progress: Progress, done: int, total: int) -> Progress:
    return lambda i, _, text: progress(done + i, total, text)

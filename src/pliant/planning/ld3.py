"""LD3 as a planner: learned times for full steps, begun at the default grid and at OptimalSteps' (sheet H, 8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pliant.guidance import guide
from pliant.planning.learned_times import Clean, learn_times
from pliant.planning.propagation import optimal_steps
from pliant.planning.request import Request, planner
from pliant.planning.result import PlanResult
from pliant.planning.searching import NODES, SAMPLES, prepare
from pliant.planning.stepping import SOLVER_OF_ORDER, check_order
from pliant.planning.task import Task


@planner
def ld3(
    request: Request,
    *,
    nodes: int = NODES,
    samples: int = 2 * SAMPLES,
    orders: Sequence[int] = (2,),
    updates: int = 40,
    batch: int = 16,
) -> PlanResult:
    """As many full steps as the budget pays for, at times learned by gradient.

    Begins at OptimalSteps' grid, which a gradient alone rarely finds from the default one. Calls: OptimalSteps', and
    about four times updates * steps on `batch` images; the weights need no gradient.
    """
    task = request.task("ld3", updates=updates, batch=batch)
    count = task.most_steps()
    search = prepare(task, request.seed, max(nodes, count), samples)
    labels = search.labels
    plans = []
    for order in orders:
        check_order(order)
        solver = SOLVER_OF_ORDER[order]
        route = optimal_steps(search.field, search.teacher, count, order)
        first = task.uniform(count, solver, [search.field.nodes[k].t for k in route.places])
        learned = learn_times(
            lambda rows: _clean(task, labels[rows]), task.model.path, first.times, search.start,
            search.teacher.states[-1], order, updates, batch, seed=request.seed, report=request.progress,
        )  # fmt: skip
        plans += [task.uniform(count, solver), first, task.uniform(count, solver, learned.times)]
        task.settings[f"learned_{solver}"] = {"before": learned.before, "after": learned.after}
    task.consider_all(plans)
    return task.finish()


def _clean(task: Task, labels: Tensor) -> Clean:
    """The model's guided clean-data estimate, differentiable in the state and the time."""
    model, cfg = task.model, task.cfg
    null = torch.full_like(labels, model.num_classes)

    def estimate(x: Tensor, t: Tensor) -> Tensor:
        prediction = model(x, t, labels)
        if cfg is not None:
            reference = model(x, t, null).value
            prediction.value = guide(prediction.value, reference, cfg.scale, cfg.channels)
        return prediction.to("sample")

    return estimate

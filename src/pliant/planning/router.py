"""A ready plan for every class, for a mean budget: easy classes take the cheap plan (CATImage; AdaDiff).

Sheet E, cost-aware routing (arXiv 2506.14753): `argmax_m q_m(y) - lambda c_m`, with the price lambda that the budget
asks for. The rule is `pliant.planning.routing`; here its qualities are measured and its outcome is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pliant.errors import PlanError
from pliant.planning.closed_form import known_for
from pliant.planning.defaults import default_extractor, default_objective
from pliant.planning.distribution import FRESH, FrechetObjective, apart, features_of, sampled_features
from pliant.planning.objective import Objective
from pliant.planning.relative import PooledFeatures, decode_for
from pliant.planning.request import Request, planner
from pliant.planning.result import PlanResult, confirm
from pliant.planning.routing import Router, class_means, measured_quality
from pliant.planning.task import Task
from pliant.planning.teacher import labels_of
from pliant.plans import Budget, Plan, RoutedPlans

SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Of the budget: what the ready plans are for, where none are given."""
NUM = 16


@planner
def router(
    request: Request, *, plans: Sequence[Plan] | None = None, num: int = NUM, shrink: float = 4.0
) -> PlanResult:
    """One of several ready plans per class, or the best single one where routing does not pay.

    plans: to choose among; None: what `known` knows for budgets around this one. Quality of a plan for a class: minus
    the mean square distance, in the judge's features, from its images to those of full compute from the same noises,
    over `num` seeds per class, drawn towards the mean of all classes by the weight of `shrink` seeds. The routed plans
    and the best single plan within the budget are then compared on fresh seeds by the objective (by
    `default_objective` if there is none), which decides. The budget is FLOPs per image, every class as often as the
    others; a budget in seconds is refused: classes with different plans do not share a batch. Images sampled:
    classes * num * (plans + 1), and those of the objective.
    """
    task = replace(request, objective=None).task("router", num=num, shrink=shrink)
    if task.budget.seconds is not None:
        raise PlanError("planner 'router' takes a budget of FLOPs, e.g. 20%: a batch's seconds depend on its classes")
    if num < 1 or not shrink >= 0.0:
        raise PlanError(f"planner 'router' needs num of 1 or more and shrink of 0 or more, got {num} and {shrink:g}")
    model, limit = task.model, task.limit
    ready = _ready(task) if plans is None else tuple({plan.digest(): plan for plan in plans}.values())
    costs = torch.tensor([float(task.budget.spent(plan, model)) for plan in ready], dtype=torch.float64)
    if not ready or float(costs.min()) > limit:
        cheapest = task.budget.describe(float(costs.min()), task.full(), model) if ready else "there is none"
        raise PlanError(f"planner 'router' has no ready plan within the budget; the cheapest: {cheapest}")
    judge = request.objective or default_objective(model, task.steps, task.guidance, first_seed=FRESH)

    first = apart(request.seed * 1000)  # not those that confirm
    seeds = range(first, first + num * model.num_classes)
    labels = labels_of(model, seeds).tolist()
    score = _closeness(task, judge, labels, seeds)
    columns = []
    for k, plan in enumerate(ready):
        columns.append(measured_quality(model, [plan], labels, seeds, score))
        if request.progress is not None:
            request.progress(k + 1, len(ready), f"measured plan {plan.digest()}")
    quality = torch.cat(columns, 1)

    rule = Router(ready, costs, lambda means: means)
    means = class_means(quality, labels, model.num_classes, shrink)
    price = rule.price_for(means, limit)
    null = rule.decide(quality.mean(0, keepdim=True), price)
    routed = _pruned(RoutedPlans(ready, tuple(torch.cat([rule.decide(means, price), null]).tolist())))
    affordable = [k for k in range(len(ready)) if float(costs[k]) <= limit]
    single = ready[max(affordable, key=lambda k: float(quality[:, k].mean()))]

    task.settings.update(
        price=price,
        plans=[
            {"plan": plan.digest(), "flops": cost, "quality": worth}
            for plan, cost, worth in zip(ready, costs.tolist(), quality.mean(0).tolist(), strict=True)
        ],
        single=single.digest(),
        routed=routed.digest(),
        seeds=f"{seeds[0]}..{seeds[-1]}",
    )  # fmt: skip
    found = []
    for finalist in (single, routed):
        task.consider(finalist)
        found.append(task.finish())
    fresh = judge.on_fresh_seeds() if request.objective and isinstance(judge, FrechetObjective) else judge
    return confirm(found, model, fresh, request.progress)


def _ready(task: Task) -> tuple[Plan, ...]:
    """What is known for budgets around the task's, cheapest first; those too small for any plan are left out."""
    full = float(task.budget.spent(task.full(), task.model))
    found: dict[str, Plan] = {}
    for share in SHARES:
        try:
            plan = known_for(replace(task, budget=Budget(flops=min(full, share * task.limit)))).single
        except PlanError:
            continue
        found.setdefault(plan.digest(), plan)
    return tuple(found.values())


def _closeness(
    task: Task, judge: Objective, labels: Sequence[int], seeds: Sequence[int]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Minus the mean square distance of features to those of full compute's images, for all samples in this order."""
    model = task.model
    if isinstance(judge, FrechetObjective):
        extractor, decode = judge.extractor, judge.decode
    else:  # what it looks at is not known: then what the default one would
        extractor = default_extractor(model) or PooledFeatures(model.config.in_channels)
        decode = decode_for(model, extractor)
    wanted = sampled_features(model, task.full(), torch.tensor(labels), seeds, extractor, 256, decode)
    return lambda images, _: -(features_of(images, extractor, decode) - wanted).square().mean(1)


def _pruned(routed: RoutedPlans) -> RoutedPlans:
    """Without the plans that no class takes."""
    taken = sorted(set(routed.table))
    return RoutedPlans(tuple(routed.plans[p] for p in taken), tuple(taken.index(p) for p in routed.table))

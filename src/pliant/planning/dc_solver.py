"""DC-Solver as a planner (arXiv 2409.03755; sheet D, 3): UniPC with fitted compensation ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.planning.cascade import CascadeRegression
from pliant.planning.field import Mode, ModelField
from pliant.planning.request import Request, planner
from pliant.planning.result import PlanResult
from pliant.planning.searching import planner_seeds, with_proxy
from pliant.planning.teacher import labels_of, teacher_trajectories
from pliant.plans import Plan
from pliant.plans.compensation import Compensation, fit_compensation
from pliant.solvers import DCSolver, Eval, Output, nodes_of

TEACHER_STEPS = 120


@planner
def dc_solver(
    request: Request,
    *,
    samples: int = 16,
    trials: int = 16,
    orders: Sequence[int] = (2, 3),
    regression: CascadeRegression | None = None,
) -> PlanResult:
    """As many full steps as the budget pays for, with one fitted ratio per step, for every order of UniPC.

    regression: predicts the ratios instead (`fit_cascade`); nothing is fitted then. UniPC without ratios is measured
    too. Calls: orders * steps * trials on `samples` images, and a teacher of 120 steps.
    """
    task = request.task("dc-solver", trials=trials)
    count = task.most_steps(DCSolver(order=max(orders)))
    with_proxy(task, request.seed)
    plans = []
    for k, order in enumerate(orders):
        plain = task.uniform(count, DCSolver(order=order))
        if regression is None:
            solver = compensated(task.model, plain, planner_seeds(request.seed, samples), trials).solver
        else:
            solver = DCSolver(order=order, ratios=regression.predict(count, request.guidance or 1.0))
        plans += [plain, plain.with_steps(replace(step, solver=solver) for step in plain.steps)]
        if request.progress is not None:
            request.progress(k + 1, len(orders), f"ratios of order {order} fitted")
    task.consider_all(plans)
    ratios = [list(step.solver.ratios) for p in plans[1::2] if isinstance((step := p.steps[0]).solver, DCSolver)]
    return task.finish(ratios=ratios)


def compensated(model: Denoiser, plain: Plan, seeds: Sequence[int], trials: int = 16) -> Compensation:
    """Ratios for a plan whose steps all use one `DCSolver`, fitted to a converged run of the same guidance."""
    first = plain.steps[0]
    assert isinstance(first.solver, DCSolver)
    labels = labels_of(model, seeds)
    teacher = teacher_trajectories(
        model, Plan.uniform(model, TEACHER_STEPS, "dpmpp-2m", guidance=first.guidance), seeds
    )
    field = ModelField(model, plain.times, labels.tolist(), [Mode(first.compute, first.guidance)])
    places = {node.t: k for k, node in enumerate(field.nodes)}

    def evaluate(x: Tensor, evaluation: Eval) -> Output:
        return Output(field.output(x, places[evaluation.node.t]))

    targets = [teacher.at(node) for node in nodes_of(plain.path, plain.times)[1:]]
    return fit_compensation(
        plain.path, plain.times, evaluate, teacher.states[0], targets, model.prediction, first.solver, trials=trials
    )


def fit_cascade(
    model: Denoiser, steps: Sequence[int], scales: Sequence[float], seed: int = 0, samples: int = 16, trials: int = 16
) -> CascadeRegression:
    """Ratios fitted for every number of steps and guidance scale, and the polynomial through them."""
    searched = {}
    for scale in scales:
        for count in steps:
            plain = Plan.uniform(model, count, DCSolver(order=2), guidance=scale)
            found = compensated(model, plain, planner_seeds(seed, samples), trials)
            searched[count, scale] = found.ratios or (1.0,) * count
    return CascadeRegression.fit(searched)

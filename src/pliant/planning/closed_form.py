"""The plan that needs no search: found in advance, or in closed form."""

from __future__ import annotations

from dataclasses import replace

from pliant.denoiser import Denoiser
from pliant.planning.ready import ready
from pliant.planning.result import PlanResult, measured_against
from pliant.planning.task import Task
from pliant.planning.teacher import weights_of
from pliant.planning.weak_split import weak_split
from pliant.plans import Budget


def known(
    model: Denoiser, budget: float | str | Budget, *, steps: int = 50, guidance: float | None = None
) -> PlanResult:
    """Without sampling anything: the plan found in advance, or the closed form (weak steps first, or fewer steps)."""
    return known_for(Task.begin("closed-form", model, budget, None, steps, guidance, 0, None))


def known_for(task: Task) -> PlanResult:
    """The same for a planner's task."""
    found = ready(task)
    if found is not None:
        plan = measured_against(found.single, task.full(), task.model)
        if found.settings.get("weights_sha256") == weights_of(task.model):
            return replace(found, plan=plan)
        # Of a relative, such as a fine-tuned one: its plan is a good guess, its quality that of another model.
        return replace(found, plan=plan.noting(score=None), quality=None)
    return closed_form(task)


def closed_form(task: Task) -> PlanResult:
    """Weak steps first where the model has weak steps, else fewer steps: nothing is sampled, nothing is looked up."""
    model, steps = task.model, task.steps
    if len(model.patch_sizes) > 1:
        return weak_split(model, task.budget, steps=steps, guidance=task.guidance)
    task.consider(task.uniform(task.most_steps()))
    return task.finish()

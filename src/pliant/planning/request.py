"""What every searching planner takes, in one object, and the decorator that makes the public function of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import update_wrapper
from pathlib import Path as FilePath
from typing import Any

from pliant.denoiser import Denoiser
from pliant.planning.objective import Objective
from pliant.planning.proxies import SampleError
from pliant.planning.racing import Effort
from pliant.planning.result import PlanResult, Progress
from pliant.planning.task import Task
from pliant.planning.teacher import TeacherSettings
from pliant.plans import Budget


@dataclass(frozen=True, eq=False)
class Request:
    """A budget for a model, what full compute is, what decides, and how long to search."""

    model: Denoiser
    budget: float | str | Budget
    objective: Objective | None = None
    steps: int = 50
    guidance: float | None = None
    seed: int = 0
    progress: Progress | None = None
    effort: Effort = field(default_factory=Effort)

    def task(self, planner: str, **settings: Any) -> Task:
        """The planner's task; settings: facts that identify the search besides these."""
        return Task.begin(
            planner, self.model, self.budget, self.objective, self.steps, self.guidance, self.seed, self.progress,
            **settings,
        )  # fmt: skip

    def sample_error(self) -> SampleError:
        """The cheap judge where none was given: the error to a converged teacher's samples, of 32 seeds."""
        first = self.seed * 1000
        return SampleError(self.model, TeacherSettings(guidance=self.guidance), range(first, first + 32))


def _call(
    model: Denoiser,
    budget: float | str | Budget,
    *,
    objective: Objective | None = None,
    steps: int = 50,
    guidance: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    evaluations: int = 120,
    seconds: float | None = None,
    journal: str | FilePath | None = None,
    finalists: int = 6,
    num: int | None = None,
) -> Request:
    """The arguments that all searching planners share; the last five are an `Effort`'s."""
    effort = Effort(evaluations, seconds, journal, finalists, num)
    return Request(model, budget, objective, steps, guidance, seed, progress, effort)


def search_planner(evaluations: int) -> Callable[[Callable[..., PlanResult]], Callable[..., PlanResult]]:
    """Of `inner(request, *, <its own options>)` a planner `(model, budget, *, <what all share>, <its own options>)`.

    evaluations: how many it makes unless told otherwise. The signature says all of it, so that `search` and the command
    line find the options by name.
    """
    shared = [
        p.replace(default=evaluations) if p.name == "evaluations" else p
        for p in inspect.signature(_call).parameters.values()
    ]
    names = {p.name for p in shared}

    def made(inner: Callable[..., PlanResult]) -> Callable[..., PlanResult]:
        own = list(inspect.signature(inner).parameters.values())[1:]
        signature = inspect.Signature([*shared, *own], return_annotation=PlanResult)

        def planner(*args: Any, **options: Any) -> PlanResult:
            bound = signature.bind(*args, **options)
            bound.arguments.setdefault("evaluations", evaluations)
            given = bound.arguments
            request = _call(**{k: v for k, v in given.items() if k in names})
            return inner(request, **{k: v for k, v in given.items() if k not in names})

        update_wrapper(planner, inner)
        planner.__signature__ = signature  # type: ignore[attr-defined]
        del planner.__wrapped__  # type: ignore[attr-defined]
        return planner

    return made

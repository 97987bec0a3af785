"""What every planner takes, in one object, and the decorators that make public functions of it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import update_wrapper
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.planning.distribution import apart
from pliant.planning.objective import Objective
from pliant.planning.proxies import SampleError
from pliant.planning.racing import Effort
from pliant.planning.result import PlanResult, Progress
from pliant.planning.task import Task
from pliant.planning.teacher import TeacherSettings
from pliant.plans import Budget, Plan, RoutedPlans


@dataclass(frozen=True, eq=False)
class Request:
    """A budget for a model, what full compute is, what decides, and how long a search may take."""

    model: Denoiser
    budget: float | str | Budget
    objective: Objective | None = None
    steps: int = 50
    guidance: float | None = None
    seed: int = 0
    progress: Progress | None = None
    effort: Effort = field(default_factory=Effort)
    options: Mapping[str, Any] = field(default_factory=dict)
    """The planner's own, as given or by default, for its result's settings."""

    def task(self, planner: str, **settings: Any) -> Task:
        """The planner's task; settings: facts that identify the search besides these and the options."""
        told = {"options": {name: in_json(value) for name, value in self.options.items()}} if self.options else {}
        return Task.begin(
            planner, self.model, self.budget, self.objective, self.steps, self.guidance, self.seed, self.progress,
            **told, **settings,
        )  # fmt: skip

    def sample_error(self) -> SampleError:
        """The cheap judge where none was given: the error to a converged teacher's samples, of 32 seeds."""
        first = apart(self.seed * 1000)
        return SampleError(self.model, TeacherSettings(guidance=self.guidance), range(first, first + 32))


def in_json(value: Any) -> Any:
    """An option as settings keep it: plans by their digest, tensors by their content, other objects as they say."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Plan, RoutedPlans)):
        return value.digest()
    if isinstance(value, Mapping):
        return {str(k): in_json(v) for k, v in value.items()}
    if isinstance(value, Tensor):
        content = value.detach().to("cpu", torch.float64).contiguous().numpy().tobytes()
        return {"shape": list(value.shape), "sha256": hashlib.sha256(content).hexdigest()}
    if isinstance(value, Sequence):
        return [in_json(v) for v in value]
    for name in ("to_config", "to_dict", "describe"):
        if hasattr(value, name):
            return getattr(value, name)()
    return type(value).__name__


def _shared(
    model: Denoiser,
    budget: float | str | Budget,
    *,
    objective: Objective | None = None,
    steps: int = 50,
    guidance: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Request:
    """The arguments that all planners share."""
    return Request(model, budget, objective, steps, guidance, seed, progress)


Planner: TypeAlias = Callable[..., PlanResult]
"""`planner(model, budget, *, objective=None, steps=50, guidance=None, seed=0, progress=None, **options)`.

budget: as `parse_budget` reads it. objective: chooses among the planner's finalists; None: its own proxy, or nothing to
choose. steps, guidance: of the all-powerful plan that counts as full compute. options: the planner's own, all with
defaults. Raises PlanError for a budget below the planner's cheapest plan, naming that.
"""


def planner(inner: Callable[..., PlanResult]) -> Planner:
    """Of `inner(request, *, <its own options>)` a planner `(model, budget, *, <what all share>, <its own options>)`.

    The signature says all of it, so that `search`, the command line and help find the options by name.
    """
    return _public(inner, {})


def search_planner(evaluations: int) -> Callable[[Callable[..., PlanResult]], Planner]:
    """The same for planners that search, which take the fields of an `Effort`, too; `evaluations`: its default."""
    effort = dict(inspect.signature(Effort).parameters)
    effort["evaluations"] = effort["evaluations"].replace(default=evaluations)
    return lambda inner: _public(inner, effort)


def _public(inner: Callable[..., PlanResult], effort: Mapping[str, inspect.Parameter]) -> Planner:
    shared = inspect.signature(_shared).parameters
    searching = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in effort.values()]
    own = list(inspect.signature(inner).parameters.values())[1:]
    signature = inspect.Signature([*shared.values(), *searching, *own], return_annotation=PlanResult)

    def public(*args: Any, **options: Any) -> PlanResult:
        try:
            bound = signature.bind(*args, **options)
        except TypeError as error:
            raise TypeError(f"{inner.__name__}() {error}") from None
        bound.apply_defaults()
        given = bound.arguments
        request = _shared(**{name: given.pop(name) for name in shared})
        if effort:
            request = replace(request, effort=Effort(**{name: given.pop(name) for name in effort}))
        result = inner(replace(request, options=dict(given)), **given)
        if not effort:
            return result
        told = {k: v for k, v in asdict(request.effort).items() if k != "journal"}
        return replace(result, settings={**result.settings, "effort": told})

    update_wrapper(public, inner)
    public.__signature__ = signature  # type: ignore[attr-defined]
    del public.__wrapped__  # type: ignore[attr-defined]
    return public

"""What planners of times share: the grid they choose from, a teacher on it, and plans made of what they chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pliant.planning.distribution import apart
from pliant.planning.dynamic_programming import Route
from pliant.planning.field import Mode, ModelField
from pliant.planning.proxies import SampleError
from pliant.planning.stepping import SOLVER_OF_ORDER
from pliant.planning.task import Task
from pliant.planning.teacher import TeacherSettings, Trajectories, labels_of, teacher_trajectories
from pliant.plans import Plan, Step
from pliant.plans.plan import made_for
from pliant.solvers import SolverLike, get_solver

NODES, SAMPLES = 40, 32
"""Intervals of the grid that is searched, and trajectories that costs are averaged over."""

TEACHER_PARTS = 3
"""Steps of the teacher per interval."""


@dataclass(frozen=True, eq=False)
class Search:
    """A field on a grid and the teacher's states there."""

    field: ModelField
    teacher: Trajectories
    modes: tuple[Mode, ...]
    labels: Tensor
    """(N,) classes of the trajectories."""

    @property
    def start(self) -> Tensor:
        return self.teacher.states[0]


def planner_seeds(seed: int, count: int, purpose: int = 0) -> list[int]:
    """Seeds of images that a planner looks at: apart for every seed and purpose, from those that people choose and
    from those that confirm."""
    first = apart(100_000_000 + seed * 100_000) + purpose * 10_000
    return list(range(first, first + count))


def prepare(
    task: Task,
    seed: int,
    nodes: int = NODES,
    samples: int = SAMPLES,
    modes: Sequence[Mode] | None = None,
    guided: bool = True,
) -> Search:
    """A grid of `nodes` steps of the path's default, searched on `samples` trajectories; mode 0 is full compute.

    The teacher takes `TEACHER_PARTS` second-order steps per interval; guided: with the task's guidance. Gives the task
    a proxy objective if it has none.
    """
    model = task.model
    modes = tuple(modes or (Mode(task.full().steps[0].compute, task.cfg),))
    parts, scale = nodes * TEACHER_PARTS, task.guidance if guided else None
    seeds = planner_seeds(seed, samples)
    fine = teacher_trajectories(model, Plan.uniform(model, parts, "dpmpp-2m", guidance=scale), seeds)
    coarse = slice(None, None, TEACHER_PARTS)
    teacher = Trajectories(fine.nodes[coarse], fine.states[coarse], fine.clean[coarse])
    labels = labels_of(model, seeds)
    field = ModelField(model, [n.t for n in teacher.nodes], labels.tolist(), modes)
    with_proxy(task, seed, samples)
    task.settings.update(nodes=nodes, samples=samples, modes=[m.describe() for m in modes])
    return Search(field, teacher, modes, labels.to(model.device))


def with_proxy(task: Task, seed: int, samples: int = SAMPLES) -> None:
    """Give a task without an objective the error to a teacher's samples, on seeds that the search did not see."""
    if task.objective is None:
        teacher = TeacherSettings(steps=100, guidance=task.guidance)
        task.objective = SampleError(task.model, teacher, planner_seeds(seed, 2 * samples, purpose=1))
        task.settings["objective"] = task.objective.describe()


def plan_of(task: Task, search: Search, route: Route, solver: SolverLike) -> Plan:
    """The plan that takes a route through the searched grid."""
    times = [search.field.nodes[k].t for k in route.places]
    chosen = get_solver(solver)
    steps = []
    for t, index in zip(times, route.modes, strict=False):
        mode = search.modes[index]
        steps.append(Step(t, chosen, mode.compute, mode.guidance))
    provenance = {"places": list(route.places), "of": len(search.field.nodes) - 1, "search_error": route.value}
    plan = Plan(tuple(steps), task.model.path, times[-1], made_for(task.model), provenance=provenance)
    plan.check(task.model)
    return plan


def consider_routes(task: Task, search: Search, routes: Sequence[Route], solvers: Sequence[SolverLike]) -> None:
    """Measure the routes with every solver, and the default grid too: a searched grid must beat it to be accepted."""
    found = [plan_of(task, search, route, solver) for route in routes for solver in solvers]
    default = [task.uniform(len(route.modes), solver) for route in routes[:1] for solver in solvers]
    task.consider_all([*default, *found])
    task.settings["searched"] = [{"times": p.times, "digest": p.digest()} for p in found]


SOLVERS = tuple(SOLVER_OF_ORDER.values())

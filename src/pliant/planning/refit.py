"""Fitted coefficients for any plan: OLSS's least squares on the times, computes and guidance that a search chose.

The teacher takes many steps at full compute, guided wherever the plan is. So a fit corrects what few steps and weak
calls do to the trajectory, and leaves what guidance was chosen to do. (`least_squares` has the fit itself.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import PliantError
from pliant.guidance import Guidance
from pliant.planning.field import Mode, ModelField
from pliant.planning.least_squares import fit_rows
from pliant.planning.searching import planner_seeds
from pliant.planning.teacher import Trajectories, labels_of, teacher_trajectories
from pliant.plans import Plan, Step
from pliant.solvers import get_solver, nodes_of

FINE, SAMPLES, RIDGE = 60, 32, 1e-5


class Teachers:
    """Teacher trajectories by plan and seeds: structures that guide alike share one. The newest few are kept."""

    def __init__(self, keep: int = 4) -> None:
        self.keep = keep
        self._known: dict[tuple[str, tuple[int, ...]], Trajectories] = {}

    def __call__(self, model: Denoiser, plan: Plan, seeds: Sequence[int]) -> Trajectories:
        key = (plan.digest(), tuple(seeds))
        found = self._known.pop(key, None)
        self._known[key] = teacher_trajectories(model, plan, seeds) if found is None else found
        while len(self._known) > self.keep:
            del self._known[next(iter(self._known))]
        return self._known[key]


def refitted(
    model: Denoiser,
    plan: Plan,
    seed: int = 0,
    samples: int = SAMPLES,
    ridge: float = RIDGE,
    fine: int = FINE,
    teachers: Callable[[Denoiser, Plan, Sequence[int]], Trajectories] = teacher_trajectories,
) -> Plan | None:
    """The plan with a fitted row for every step, at the same cost.

    None for plans whose calls depend on earlier ones (caches, remembered references), whose solvers evaluate more than
    once per step, or that cannot be fitted. teachers: `Teachers`, to run a teacher once for many plans.
    """
    if any(s.solver.evaluations_per_step != 1 or not s.compute.plain for s in plan.steps):
        return None
    seeds = planner_seeds(seed, samples, purpose=2)
    labels = labels_of(model, seeds)
    modes = list(dict.fromkeys(Mode(s.compute, s.guidance) for s in plan.steps))
    which = [modes.index(Mode(s.compute, s.guidance)) for s in plan.steps]
    try:
        field = ModelField(model, plan.times, labels.tolist(), modes)
        teacher = teachers(model, teacher_of(model, plan, fine), seeds)
        nodes = nodes_of(model.path, plan.times)
        found = fit_rows(
            lambda x, place: field.output(x, place, which[place]),
            nodes,
            range(len(nodes)),
            teacher.states[0],
            [teacher.at(node) for node in nodes[1:]],
            model.prediction,
            ridge,
        )
        fitted = plan.with_steps(replace(s, solver=row) for s, row in zip(plan.steps, found.steps, strict=True))
        fitted = replace(fitted, provenance={**plan.provenance, "fitted": {"samples": samples, "seed": seed}})
        fitted.check(model)
    except PliantError:
        return None
    return fitted


class Fitter:
    """`refitted` for one model and seed, with teachers that are kept."""

    def __init__(self, model: Denoiser, seed: int, samples: int = SAMPLES, fine: int = FINE) -> None:
        self.model, self.seed, self.samples, self.fine, self._teachers = model, seed, samples, fine, Teachers()

    def __call__(self, plan: Plan) -> Plan | None:
        return refitted(self.model, plan, self.seed, self.samples, fine=self.fine, teachers=self._teachers)


def teacher_of(model: Denoiser, plan: Plan, fine: int = FINE) -> Plan:
    """Many second-order steps at full compute from the same start, guided as the plan is at each time."""
    grid = Plan.uniform(model, fine)
    start, end = plan.times[0], plan.end
    span = grid.times[0] - grid.end
    times = [end + (start - end) * (t - grid.end) / span for t in grid.times[:-1]]
    solver = get_solver("dpmpp-2m")
    rows = []
    for t in times:
        here = [s for s in plan.steps if s.t >= t - 1e-12] or [plan.steps[0]]
        rows.append(Step(t, solver, Compute(), full_guidance(here[-1].guidance)))
    return plan.with_steps(rows)


def full_guidance(guidance: Guidance | None) -> Guidance | None:
    """The same guidance with its reference at full compute; a weak reference's scale becomes classifier-free."""
    if guidance is None:
        return None
    scale = 1.0 + 2.5 * (guidance.scale - 1.0) if guidance.against == "weak" else guidance.scale
    return replace(guidance, against="null", compute=None, scale=scale, gain=(1.0, 1.0), moderation=1.0)

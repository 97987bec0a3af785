"""Plans from a few numbers: the same compute everywhere, or weak steps first (FlexiDiT, arXiv 2502.20126)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.guidance import Guidance, weak_scale
from pliant.plans.budget import Budget, parse_budget
from pliant.plans.plan import Plan, Step, made_for
from pliant.plans.times import Times, how_timed, make_times
from pliant.solvers import SolverLike, get_solver


def as_guidance(guidance: float | Guidance | None) -> Guidance | None:
    """A number is a classifier-free scale; 1 and None are no guidance."""
    if guidance is None or isinstance(guidance, Guidance):
        return guidance
    return None if guidance == 1.0 else Guidance.cfg(float(guidance))


def uniform(
    model: Denoiser,
    steps: int = 50,
    solver: SolverLike = "dpmpp-2m",
    compute: Compute | None = None,
    guidance: float | Guidance | None = None,
    times: Times = None,
) -> Plan:
    """The same solver, compute and guidance at every step."""
    grid = make_times(model, steps, times)
    chosen, compute = get_solver(solver), compute or Compute()
    rows = tuple(Step(t, chosen, compute, as_guidance(guidance)) for t in grid[:-1])
    provenance = {"preset": "uniform", **how_timed(model, times, grid)}
    plan = Plan(rows, model.path, grid[-1], made_for(model), provenance=provenance)
    plan.check(model)
    return plan


def turbo(
    model: Denoiser,
    heun: int,
    pseudo: int,
    refined: int,
    *,
    guidance: float | Guidance | None = None,
    times: Times = None,
) -> Plan:
    """FlowTurbo's plan (arXiv 2409.18128): full Heun steps, then pseudo-corrected ones, then refiner steps.

    It calls the network 2 heun + pseudo times (once more without Heun steps) and the refiner twice per refined step.
    times: as in `Plan.uniform`; the paper's are equal. Raises PlanError for a model without a refiner, if one is asked.
    """
    if min(heun, pseudo, refined) < 0 or heun + pseudo < 1:
        raise PlanError("a turbo plan takes at least one full step: heun or pseudo, then refined")
    count = heun + pseudo + refined
    grid = make_times(model, count, times or "uniform")
    pece, pec, guide = get_solver("pece"), get_solver("pec"), as_guidance(guidance)
    kinds = [(pece, Compute())] * heun + [(pec, Compute())] * pseudo + [(pece, Compute(refine=True))] * refined
    rows = tuple(Step(t, solver, compute, guide) for t, (solver, compute) in zip(grid[:-1], kinds, strict=True))
    provenance = {"preset": "turbo", "heun": heun, "pseudo": pseudo, "refined": refined}
    plan = Plan(rows, model.path, grid[-1], made_for(model), provenance=provenance)
    plan.check(model)
    return plan


def weakest(model: Denoiser) -> Compute:
    """The coarsest patch size the model has. Raises PlanError if it has only one."""
    if len(model.patch_sizes) < 2:
        raise PlanError("this model has one patch size only, so no weak steps; make it flexible with pliant.flexify")
    return Compute(patch=max(model.patch_sizes, key=math.prod))


def fewest_weak(steps: int, fits: Callable[[int], bool]) -> int | None:
    """The fewest weak steps that fit, which spends the most that may be spent; None if not even `steps` do.

    Every weak step makes a mixed plan cheaper. The ends are looked at alone: a second network in a run takes
    some time once.
    """
    if fits(0):
        return 0
    mixed = 1 + bisect_left(range(1, steps), True, key=fits)
    return mixed if mixed < steps or fits(steps) else None


def weak_to_powerful(
    model: Denoiser,
    steps: int = 50,
    budget: float | str | Budget | None = None,
    *,
    weak_steps: int | None = None,
    weak_guidance_steps: int | None = None,
    weak: Compute | None = None,
    powerful: Compute | None = None,
    solver: SolverLike = "dpmpp-2m",
    guidance: float | None = None,
    guided_channels: int | None = None,
    times: Times = None,
    weak_last: bool = False,
    reset_history_on_switch: bool = False,
    then: Callable[[Plan], Plan] | None = None,
) -> Plan:
    """`weak_steps` first steps at the weak patch size, the rest at the powerful one (sheet A, 1.7 and 1.8).

    Give either `budget` (the fewest weak steps that meet it are found) or `weak_steps`.
    guidance: classifier-free scale s1. weak_guidance_steps: how many of the *powerful* steps, the earliest ones, use
    the weak call with the same condition as the reference, with scale `weak_scale(s1)`. In the paper's x/y notation
    x = steps - weak_steps and y = x - weak_guidance_steps. weak_last: the reversed schedule, a baseline. then: what is
    done to every split before its cost is compared with the budget, such as caching.
    Raises PlanError for a budget below the cheapest schedule, saying what the least is.
    """
    if (budget is None) == (weak_steps is None):
        raise PlanError("give either a budget or a number of weak steps")
    weak, powerful = weak or weakest(model), powerful or Compute()
    grid = make_times(model, steps, times)
    chosen = get_solver(solver)
    scale = None if guidance is None or guidance == 1.0 else float(guidance)
    between = weak_guidance_steps or 0
    if between and scale is None:
        raise PlanError("weak guidance steps need a guidance scale, e.g. guidance=1.5")

    cfg = Guidance.cfg(scale, channels=guided_channels) if scale else None

    def rows(count: int) -> tuple[Step, ...]:
        first = [Step(0.0, chosen, weak, cfg)] * count
        mixed = Guidance.weak_model(weak_scale(scale), weak, guided_channels) if scale else None
        middle = [Step(0.0, chosen, powerful, mixed)] * min(between, steps - count)
        last = [Step(0.0, chosen, powerful, cfg)] * (steps - count - len(middle))
        ordered = [*middle, *last, *first] if weak_last else [*first, *middle, *last]
        return tuple(Step(t, s.solver, s.compute, s.guidance) for t, s in zip(grid[:-1], ordered, strict=True))

    def plan(count: int) -> Plan:
        provenance: dict[str, Any] = {"preset": "weak-to-powerful", "weak_steps": count, "weak_guidance_steps": between}
        provenance.update(how_timed(model, times, grid))
        if weak_last:
            provenance["preset"] = "powerful-to-weak"
        made = Plan(rows(count), model.path, grid[-1], made_for(model), reset_history_on_switch, provenance)
        return made if then is None else then(made)

    if weak_steps is None:
        wanted = parse_budget(budget)  # type: ignore[arg-type]
        whole = tuple(Step(t, chosen, powerful, cfg) for t in grid[:-1])
        full = Plan(whole, model.path, grid[-1], made_for(model))
        limit = wanted.limit(full, model)
        split = fewest_weak(steps, lambda count: wanted.spent(plan(count), model) <= limit)
        if split is None:
            least = wanted.describe(wanted.spent(plan(steps), model), full, model)
            raise PlanError(
                f"a budget of {wanted.amount} is below the cheapest schedule: "
                f"all {steps} steps weak cost {least}. "
                f"Raise the budget, take fewer steps, or add a larger patch size"
            )
        weak_steps = split
    elif not 0 <= weak_steps <= steps:
        raise PlanError(f"weak_steps must lie between 0 and {steps}, got {weak_steps}")
    made = plan(weak_steps)
    made.check(model)
    return made

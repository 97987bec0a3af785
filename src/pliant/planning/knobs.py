"""Continuous knobs of a whole plan, and a pattern search over them (Hooke and Jeeves 1961).

Evolution on a few dozen measurements finds structures; how far guidance goes, when it goes further, and how times are
spread are better found by steps along each of them, doubled back and halved, on all samples of the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from pliant.errors import PliantError
from pliant.planning.objective import Score
from pliant.planning.plan_space import warped
from pliant.plans import Plan, Step

FIRST, LEAST = 1.0, 0.25
"""Steps of the search: the first, and the least that is taken."""


@dataclass(frozen=True)
class Knobs:
    """All in powers of two; 0 leaves a plan as it is.

    scale: factor of how far guidance goes, its scale's distance from 1. tilt: the same at the start, its inverse at the
    end, in between by time. warp: times shifted towards noise, as by resolution (SD3's shift).
    """

    scale: float = 0.0
    tilt: float = 0.0
    warp: float = 0.0

    def moved(self, name: str, by: float) -> Knobs:
        return replace(self, **{name: getattr(self, name) + by})


def names_for(plan: Plan) -> tuple[str, ...]:
    """The knobs that change anything: guidance where there is some, times where a step is free."""
    guided = sum(s.guidance is not None for s in plan.steps)
    there = {"scale": guided > 0, "tilt": guided > 1, "warp": len(plan.steps) > 1}
    return tuple(name for name, free in there.items() if free)


def turned(plan: Plan, knobs: Knobs) -> Plan:
    """The plan with its knobs turned; its solvers stay, so fitted coefficients should be fitted again."""
    span = plan.steps[0].t - plan.end

    def guided(step: Step) -> Step:
        if step.guidance is None:
            return step
        noise = 2.0 * (step.t - plan.end) / span - 1.0 if len(plan.steps) > 1 else 0.0
        factor = 2.0 ** (knobs.scale + knobs.tilt * noise)
        return replace(step, guidance=replace(step.guidance, scale=1.0 + factor * (step.guidance.scale - 1.0)))

    steps = warped([guided(s) for s in plan.steps], plan.end, 2.0**knobs.warp)
    before = plan.provenance.get("knobs", {})
    told = {name: value + before.get(name, 0.0) for name, value in asdict(knobs).items()}
    return plan.with_steps(steps).noting(knobs=told if any(told.values()) else None)


def pattern_search(
    plan: Plan,
    make: Callable[[Plan, Knobs], Plan | None],
    measure: Callable[[Plan], Score],
    trials: int,
    stop: Callable[[], bool] = lambda: False,
    names: Sequence[str] | None = None,
    least: float = LEAST,
) -> tuple[Plan, Knobs]:
    """The best plan met, and its knobs: along every knob as long as it helps, in halved steps where none does.

    make: the plan with knobs turned, or None where there is none; what cannot run is passed over. trials: measurements
    beside the plan's own. stop: asked before each. names: of the knobs; None: all that change anything. least: the
    least step. Never worse than `plan` by `measure`.
    """
    best, place, value = plan, Knobs(), measure(plan).value
    tried, step = {place}, FIRST
    signs = dict.fromkeys(names_for(plan) if names is None else names, 1.0)
    while step >= least and signs:
        improved = False
        for name, sign in list(signs.items()):
            for by in (sign * step, -sign * step):
                while (there := place.moved(name, by)) not in tried:
                    if trials < 1 or stop():
                        return best, place
                    tried.add(there)
                    trials -= 1
                    try:
                        candidate = make(plan, there)
                        found = float("inf") if candidate is None else measure(candidate).value
                    except PliantError:
                        break
                    if candidate is None or not found < value:
                        break
                    best, place, value, improved, signs[name] = candidate, there, found, True, by / step
        if not improved:
            step /= 2.0
    return best, place

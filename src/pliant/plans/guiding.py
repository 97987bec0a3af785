"""Guidance that changes along the plan: plan -> plan, in the order of the papers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pliant.compute.numbers import is_number
from pliant.errors import PlanError, suggest
from pliant.guidance import RULES, Guidance, Zero
from pliant.guidance.rules import rule_from_dict
from pliant.plans.plan import Plan


def guided_between(plan: Plan, guidance: Guidance, least: float = 0.283, most: float = 1.609) -> Plan:
    """Guidance only where the noise ratio sigma/alpha lies in [least, most]; other steps make no reference call.

    Decided at the start of a step and kept for all its evaluations (interval guidance, arXiv 2404.07724). On the
    linear path the ratio is t/(1-t), so [0.283, 1.609] is t in [0.22, 0.62]. Raises PlanError if no step is inside.
    """
    if not 0 <= least < most:
        raise PlanError(f"the guidance interval [{least:g}, {most:g}] is empty; give 0 <= least < most")
    inside = [least <= float(plan.path.noise_ratio(s.t)) <= most for s in plan.steps]
    if not any(inside):
        ratios = [float(plan.path.noise_ratio(s.t)) for s in plan.steps]
        raise PlanError(
            f"no step starts at a noise ratio in [{least:g}, {most:g}]: this plan's are {min(ratios):.3g} to "
            f"{max(ratios):.3g}"
        )
    return plan.with_steps(
        replace(s, guidance=guidance if here else None) for s, here in zip(plan.steps, inside, strict=True)
    )


def zero_star(plan: Plan, guidance: Guidance, still: int | None = None) -> Plan:
    """CFG-Zero* (arXiv 2503.18886) at every step; the first `still` of them (default 4 %) leave the state alone.

    Raises PlanError if no step is left to move.
    """
    count = round(0.04 * len(plan.steps)) if still is None else still
    if not 0 <= count < len(plan.steps):
        raise PlanError(f"{count} still steps of {len(plan.steps)}: some step must move the state")
    rules = [Zero(still=True)] * count + [Zero()] * (len(plan.steps) - count)
    return plan.with_steps(
        replace(s, guidance=replace(guidance, rule=rule)) for s, rule in zip(plan.steps, rules, strict=True)
    )


def computed_once(plan: Plan, guidance: Guidance, moderation: float = 1.0) -> Plan:
    """The unconditional prediction is computed at the first step only, and remembered as the clean data it saw.

    StreamDiffusion's one-time negative (arXiv 2312.12491): a guided plan at the price of one more call.
    """
    later = replace(guidance, against="remembered", compute=None, moderation=moderation)
    return plan.with_steps(
        replace(s, guidance=guidance if i == 0 else later) for i, s in enumerate(plan.steps)
    )


def computed_every(
    plan: Plan, guidance: Guidance, period: int = 3, first: int = 1, gain: tuple[float, float] = (1.0, 1.0)
) -> Plan:
    """The reference is computed at the first `first` steps, then at every `period`-th; in between it is reused.

    gain: what the reused difference's low and high frequencies are multiplied with (FasterCache, arXiv 2410.19355);
    the stored difference itself never changes. Raises PlanError for a period below 1 or without a first step.
    """
    if period < 1 or first < 1:
        raise PlanError(f"a reference computed every {period} steps, first for {first}: both must be at least 1")
    reused = replace(guidance, against="difference", compute=None, gain=gain)
    return plan.with_steps(
        replace(s, guidance=guidance if i < first or (i - first + 1) % period == 0 else reused)
        for i, s in enumerate(plan.steps)
    )


def fastercache(
    plan: Plan,
    guidance: Guidance,
    period: int = 5,
    below: float = 0.641,
    gain: float = 1.1,
    coarse_after: float = 0.099,
    coarse_before: float = 0.901,
    fine_before: float = 0.301,
) -> Plan:
    """FasterCache (arXiv 2410.19355): steps that start below t = `below` compute the reference where their number
    is a multiple of `period`, and reuse the difference elsewhere.

    A reused difference's low frequencies are multiplied with `gain` where t lies between `coarse_after` and
    `coarse_before`, its high ones below `fine_before`. Defaults: diffusers' (its time steps / 1000). Raises PlanError
    for a period below 1.
    """
    if period < 1:
        raise PlanError(f"a reference computed every {period} steps: it must be at least 1")

    def at(i: int, t: float) -> Guidance:
        if i % period == 0 or t >= below:
            return guidance
        gains = (gain if coarse_after < t < coarse_before else 1.0, gain if t < fine_before else 1.0)
        return replace(guidance, against="difference", compute=None, gain=gains)

    return plan.with_steps(replace(s, guidance=at(i, s.t)) for i, s in enumerate(plan.steps))


def cfg_plus_plus(plan: Plan, guidance: Guidance, strength: float = 0.6) -> Plan:
    """CFG++ (arXiv 2406.08070): clean data from `u + strength (c - u)`, strength in [0, 1], re-noised with u's noise.

    For a step of DDIM from noise ratio r to r' (sigma/alpha) that is ordinary guidance with the scale
    `strength / (1 - r'/r)`: both move the state by the same multiple of `c - u`. So it is a schedule of scales, small
    steps guided more, and exact for first-order steps; guidance's own scale is not used. Raises PlanError for other
    solvers, whose steps are no such sum.
    """
    if not 0.0 <= strength <= 1.0:
        raise PlanError(f"CFG++ has strength {strength:g}; expected a number from 0 to 1")
    if guidance.against != "null":
        raise PlanError(f"CFG++ is guidance against the unconditional prediction, not against {guidance.against!r}")
    steps = []
    for step, after in zip(plan.steps, plan.times[1:], strict=True):
        name = step.solver.name
        if name != "ddim" and not (name == "euler" and plan.path.name == "linear"):
            raise PlanError(f"CFG++ is for steps of ddim (or of euler on the linear path), this plan has {name!r}")
        here, there = float(plan.path.noise_ratio(step.t)), float(plan.path.noise_ratio(after))
        kept = 0.0 if math.isinf(here) else there / here
        steps.append(replace(step, guidance=replace(guidance, scale=strength / (1.0 - kept))))
    return plan.with_steps(steps)


GUIDING: dict[str, Callable[..., Plan]] = {
    "interval": guided_between,
    "zero-star": zero_star,
    "once": computed_once,
    "every": computed_every,
    "fastercache": fastercache,
    "cfg++": cfg_plus_plus,
}


def guided_plan(plan: Plan, guidance: Guidance, name: str, **options: Any) -> Plan:
    """The plan guided in a named way: one of `GUIDING`, or a rule of `pliant.guidance.RULES` at every step.

    Options are those of the function or rule; rules also take `rescale`. Raises PlanError for unknown ones.
    """
    if name in RULES and name != "zero":
        rescale = options.pop("rescale", 0.0)
        every = replace(guidance, rule=rule_from_dict({"name": name, **options}), rescale=rescale)
        return plan.with_steps(replace(s, guidance=every) for s in plan.steps).noting(guiding={"name": name, **options})
    known = [*GUIDING, *(rule for rule in RULES if rule != "zero")]
    if name not in GUIDING:
        raise PlanError(f"unknown way to guide {name!r}; {suggest(name, known)}")
    function = GUIDING[name]
    takes = list(inspect.signature(function).parameters)[2:]
    for option in options:
        if option not in takes:
            raise PlanError(f"guiding {name!r} takes {', '.join(takes)}, not {option!r}")
        if option != "gain" and not is_number(options[option]):
            raise PlanError(f"guiding {name!r} has {option} {options[option]!r}; expected a number")
        if option in ("period", "first", "still") and not isinstance(options[option], int):
            raise PlanError(f"guiding {name!r} has {option} {options[option]!r}; expected a whole number")
    return function(plan, guidance, **options).noting(guiding={"name": name, **options})

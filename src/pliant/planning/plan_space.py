"""Plans as candidates of an evolutionary search: any plan can be varied, step by step, within a budget.

A candidate is a plan without caching, as JSON, and a caching preset or none: changes of steps never break what a cache
reads, because the preset is applied afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, TypeAlias

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import PliantError
from pliant.guidance import Guidance, weak_scale
from pliant.planning.journal import key_of
from pliant.planning.task import Task
from pliant.plans import Plan, Step
from pliant.plans.cost import call_flops
from pliant.solvers import Solver, SolverLike, get_solver

SOLVERS: tuple[SolverLike, ...] = (
    "dpmpp-2m",
    "unipc-2",
    "unipc-3",
    "dpmpp-3m",
    "deis-2",
    "deis-rho-ab-3",
    "flow-ab-2",
    "ddim",
    "sde-dpmpp-2m",
)
"""One evaluation per step each, so that they can be exchanged without changing the cost."""

CACHES: tuple[dict[str, Any], ...] = (
    {"name": "fora", "interval": 2},
    {"name": "fora", "interval": 3},
    {"name": "deepcache", "interval": 2, "blocks": 1},
    {"name": "taylorseer", "interval": 2, "order": 1},
    {"name": "taylorseer", "interval": 3, "order": 1},
    {"name": "taylorseer", "interval": 3, "order": 2},
    {"name": "pab", "attention": 2},
)
"""Presets whose savings are certain: gates only promise theirs, and budgets count the most that may be spent."""

Steps: TypeAlias = list[Step]


@dataclass(frozen=True)
class Menu:
    """What a step may choose from, on one model. Computes from strong to weak."""

    computes: tuple[Compute, ...]
    guidances: tuple[Guidance | None, ...]
    solvers: tuple[Solver, ...]
    caches: tuple[dict[str, Any] | None, ...]

    @staticmethod
    def of(
        model: Denoiser,
        guidance: Guidance | None,
        solvers: Sequence[SolverLike] = SOLVERS,
        caches: Sequence[dict[str, Any]] = CACHES,
    ) -> Menu:
        """The patch sizes and exits that the model has; guidance at every step, with cheaper references, or not."""
        found = [Compute()]
        found += [Compute(patch=p) for p in model.patch_sizes if p != model.config.patch_size]
        found += [Compute(exit=depth) for depth in model.exit_depths]
        computes = tuple(sorted(found, key=lambda c: -model.flops(c)))
        guidances: list[Guidance | None] = [None]
        if guidance is not None:
            plain = replace(guidance, against="null", compute=None)
            guidances += [plain, replace(plain, against="difference")]
            for weak in computes[1:]:
                guidances.append(replace(plain, compute=weak))
                guidances.append(replace(plain, against="weak", compute=weak, scale=weak_scale(plain.scale)))
        return Menu(computes, tuple(guidances), tuple(map(get_solver, solvers)), (None, *caches))


class PlanSpace:
    """Variations of plans for a task: times, computes, guidance, solvers and caches, never over the budget.

    starts: what fresh candidates are drawn from. Raises nothing; what cannot run is dropped.
    """

    def __init__(self, task: Task, menu: Menu, starts: Sequence[Any]) -> None:
        self.task, self.model, self.menu, self.starts = task, task.model, menu, list(starts)
        self._limit = task.limit
        self._spent: dict[str, float] = {}
        self._provenance: dict[str, dict[str, Any]] = {}

    # Candidates -------------------------------------------------------------------------------------------------

    def encode(self, plan: Plan, cache: dict[str, Any] | None = None) -> dict[str, Any]:
        """A plan as a candidate; of a plan that was cached by a preset, the plan before and that preset."""
        caching = plan.provenance.get("caching")
        if cache is None and isinstance(caching, dict):
            cache = {k: v for k, v in caching.items() if k != "measured"}
            plan = plan.with_steps(replace(s, compute=uncached(s.compute)) for s in plan.steps)
        data = json.loads(json.dumps(plan.to_dict()))  # tuples become lists, as in a journal
        provenance = data.pop("provenance")
        candidate = {"plan": data, "cache": cache}
        if provenance:
            self._provenance.setdefault(key_of(candidate), provenance)
        return candidate

    def decode(self, candidate: dict[str, Any]) -> Plan:
        """Raises PliantError for what cannot run."""
        provenance = self._provenance.get(key_of(candidate), {"preset": "varied"})
        plan = Plan.from_dict({**candidate["plan"], "provenance": provenance})
        if candidate["cache"] is None:
            plan.check(self.model)
            return plan
        return plan.cached(self.model, **candidate["cache"])

    def spent(self, candidate: dict[str, Any]) -> float:
        """In the budget's unit; infinite if it cannot run."""
        key = key_of(candidate)
        if key not in self._spent:
            try:
                self._spent[key] = self.task.budget.spent(self.decode(candidate), self.model)
            except PliantError:
                self._spent[key] = float("inf")
        return self._spent[key]

    # The space --------------------------------------------------------------------------------------------------

    def sample(self, rng: Random) -> dict[str, Any]:
        value: dict[str, Any] = rng.choice(self.starts)
        for _ in range(3):
            value = self._varied(value, rng)
        return value

    def mutate(self, value: dict[str, Any], rng: Random) -> dict[str, Any]:
        for _ in range(rng.choice((1, 1, 2, 3))):
            value = self._varied(value, rng)
        return self._grown(value, rng) if rng.random() < 0.7 else value

    def cross(self, a: dict[str, Any], b: dict[str, Any], rng: Random) -> dict[str, Any]:
        """The noisy end of one plan and the clean end of the other."""
        first, second = (Plan.from_dict(v["plan"]) for v in (a, b))
        times = [s.t for s in [*first.steps[1:], *second.steps[1:]]]
        if not times:
            return a
        cut = rng.choice(times)
        steps = [s for s in first.steps if s.t > cut] + [s for s in second.steps if s.t <= cut]
        cache = rng.choice((a, b))["cache"]
        return self.encode(first.with_steps(settled(steps, self.model)), cache) | {"cache": cache}

    def repair(self, value: dict[str, Any], rng: Random) -> dict[str, Any] | None:
        """Cheaper, one change at a time, until the budget pays for it."""
        for _ in range(64):
            spent = self.spent(value)
            if spent <= self._limit:
                return value
            if spent == float("inf"):
                return None
            plain = Plan.from_dict(value["plan"])
            steps = _cheaper(list(plain.steps), self.menu, self.model, rng)
            if steps is None:
                return None
            value = {**value, "plan": self.encode(plain.with_steps(settled(steps, self.model)))["plan"]}
        return None

    # Changes ----------------------------------------------------------------------------------------------------

    def _varied(self, value: dict[str, Any], rng: Random) -> dict[str, Any]:
        plan = Plan.from_dict(value["plan"])
        if rng.random() < 0.08 and len(self.menu.caches) > 1:
            return {**value, "cache": rng.choice(self.menu.caches)}
        change = rng.choices([c for c, _ in CHANGES], [w for _, w in CHANGES])[0]
        steps = change(list(plan.steps), plan.end, self.menu, rng)
        return {**value, "plan": self.encode(plan.with_steps(settled(steps, self.model)))["plan"]}

    def _grown(self, value: dict[str, Any], rng: Random) -> dict[str, Any]:
        """Spend what is left: a step more, or a stronger one, as long as it fits."""
        for _ in range(6):
            spent = self.spent(value)
            if not spent < 0.97 * self._limit:
                break
            plan = Plan.from_dict(value["plan"])
            change = rng.choice((_insert, _stronger))
            steps = settled(change(list(plan.steps), plan.end, self.menu, rng), self.model)
            more = {**value, "plan": self.encode(plan.with_steps(steps))["plan"]}
            if self.spent(more) <= self._limit:
                value = more
        return value


def uncached(compute: Compute) -> Compute:
    """Without what a caching preset put in."""
    return replace(compute, sites=None, reuse=None, write=(), gate=None, tokens=None)


def settled(steps: Steps, model: Denoiser) -> Steps:
    """Guidance that means something at every step: references no stronger than the call, differences that exist."""
    found, computed = [], False
    for step in steps:
        g = step.guidance
        if g is not None and g.compute is not None and model.flops(g.compute) >= model.flops(step.compute):
            scale = 1.0 + 2.5 * (g.scale - 1.0) if g.against == "weak" else g.scale
            g = replace(g, against="null", compute=None, scale=scale)
        if g is not None and g.against in ("difference", "remembered") and not computed:
            g = replace(g, against="null", gain=(1.0, 1.0), moderation=1.0)
        computed |= g is not None and g.called
        found.append(replace(step, guidance=g))
    return found


# Changes of steps: (steps, end, menu, rng) -> steps ------------------------------------------------------------------


def _range(steps: Steps, rng: Random) -> range:
    """A run of steps: one, a part, or all from or up to somewhere."""
    a, b = sorted((rng.randrange(len(steps)), rng.randrange(len(steps))))
    return rng.choice((range(a, a + 1), range(a, b + 1), range(a, len(steps)), range(b + 1)))


def _move(steps: Steps, end: float, menu: Menu, rng: Random) -> Steps:
    """One start, or each, moves towards a neighbour. The first stays."""
    times = [s.t for s in steps] + [end]
    chosen = range(1, len(steps)) if rng.random() < 0.3 else [rng.randrange(1, len(steps))] if len(steps) > 1 else []
    spread = rng.choice((0.1, 0.3, 0.6))
    for k in chosen:
        shift = rng.gauss(0.0, spread)
        gap = times[k - 1] - times[k] if shift > 0 else times[k] - times[k + 1]
        times[k] += max(-0.9, min(0.9, shift)) * gap
    return [replace(s, t=t) for s, t in zip(steps, times, strict=False)]


def warped(steps: Steps, end: float, shift: float) -> Steps:
    """All times shifted towards noise (shift > 1) or data, as by resolution (SD3's shift). The first stays."""
    span = steps[0].t - end
    shares = [(s.t - end) / span for s in steps]
    return [
        replace(s, t=end + span * (shift * u / (1.0 + (shift - 1.0) * u))) if u < 1.0 else s
        for s, u in zip(steps, shares, strict=True)
    ]


def _warp(steps: Steps, end: float, menu: Menu, rng: Random) -> Steps:
    return warped(steps, end, 2.0 ** rng.gauss(0.0, 0.5))


def _insert(steps: Steps, end: float, menu: Menu, rng: Random) -> Steps:
    k = rng.randrange(len(steps))
    after = steps[k + 1].t if k + 1 < len(steps) else end
    middle = after + (steps[k].t - after) * rng.uniform(0.35, 0.65)
    return [*steps[: k + 1], replace(steps[k], t=middle), *steps[k + 1 :]]


def _delete(steps: Steps, end: float, menu: Menu, rng: Random) -> Steps:
    if len(steps) < 2:
        return steps
    k = rng.randrange(1, len(steps))
    return steps[:k] + steps[k + 1 :]


def _compute(steps: Steps, end: float, menu: Menu, rng: Random) -> Steps:
    chosen, compute = _range(steps, rng), rng.choice(menu.computes)
    return [replace(s, compute=compute) if k in chosen else s for k, s in enumerate(steps)]


def _guide(steps: Steps, end: float, menu: Menu, rng: Random) -> Steps:
    chosen, guidance = _range(steps, rng), rng.choice(menu.guidances)
    return [replace(s, guidance=guidance) if k in chosen else s for k, s in enumerate(steps)]


def _scale(steps: Steps, end: float, menu: Menu, rng: Random) -> Steps:
    """How far guidance goes, everywhere or in a part: its distance from 1 is multiplied."""
    chosen = range(len(steps)) if rng.random() < 0.5 else _range(steps, rng)
    factor = 2.0 ** rng.gauss(0.0, 0.5)

    def scaled(g: Guidance | None) -> Guidance | None:
        return None if g is None else replace(g, scale=1.0 + factor * (g.scale - 1.0))

    return [replace(s, guidance=scaled(s.guidance)) if k in chosen else s for k, s in enumerate(steps)]


def _solver(steps: Steps, end: float, menu: Menu, rng: Random) -> Steps:
    chosen = range(len(steps)) if rng.random() < 0.6 else _range(steps, rng)
    solver = rng.choice(menu.solvers)
    return [replace(s, solver=solver) if k in chosen else s for k, s in enumerate(steps)]


def _stronger(steps: Steps, end: float, menu: Menu, rng: Random) -> Steps:
    """One step's compute a size up, or its guidance computed in full."""
    k = rng.randrange(len(steps))
    s = steps[k]
    place = menu.computes.index(s.compute) if s.compute in menu.computes else 0
    if place > 0 and rng.random() < 0.6:
        s = replace(s, compute=menu.computes[place - 1])
    else:
        plain = next((g for g in menu.guidances if g is not None), None)
        if plain is not None and s.guidance is not None:
            plain = replace(plain, scale=_cfg(s.guidance))
        s = replace(s, guidance=plain)
    return [*steps[:k], s, *steps[k + 1 :]]


def _cfg(guidance: Guidance) -> float:
    return 1.0 + 2.5 * (guidance.scale - 1.0) if guidance.against == "weak" else guidance.scale


Change: TypeAlias = Callable[[Steps, float, Menu, Random], Steps]
CHANGES: tuple[tuple[Change, float], ...] = (
    (_move, 3.0),
    (_warp, 1.0),
    (_insert, 1.0),
    (_delete, 1.0),
    (_compute, 2.0),
    (_guide, 2.0),
    (_scale, 1.0),
    (_solver, 1.0),
)


def _cheaper(steps: Steps, menu: Menu, model: Denoiser, rng: Random) -> Steps | None:
    """One change that makes the plan cost less; None if there is none."""
    options: list[Steps] = []
    if len(steps) > 1:
        k = rng.randrange(1, len(steps))
        options.append(steps[:k] + steps[k + 1 :])
    k = rng.randrange(len(steps))
    for kind in (0, 1):
        for j in [*range(k, len(steps)), *range(k)]:
            s = steps[j]
            weaker = _weaker(s, menu, model) if kind == 0 else _less_guided(s, menu, model, rng)
            if weaker is not None:
                options.append([*steps[:j], weaker, *steps[j + 1 :]])
                break
    return rng.choice(options) if options else None


def _weaker(step: Step, menu: Menu, model: Denoiser) -> Step | None:
    cost = model.flops(step.compute)
    lower = next((c for c in menu.computes if model.flops(c) < cost), None)
    return None if lower is None else replace(step, compute=lower)


def _less_guided(step: Step, menu: Menu, model: Denoiser, rng: Random) -> Step | None:
    if step.guidance is None or not step.guidance.called:
        return None
    cost = call_flops(model, step.compute, step.guidance)
    cheaper = [g for g in menu.guidances if call_flops(model, step.compute, g) < cost]
    return replace(step, guidance=rng.choice(cheaper)) if cheaper else None

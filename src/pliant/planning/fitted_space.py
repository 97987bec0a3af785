"""A space of plans in which a plan may have coefficients of its own, fitted to a teacher (`refit`).

A candidate marked "fitted" stands for its plan with a fitted row per step. Rows hold for the steps they were fitted to:
what is bred from them is marked, and so fitted again.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, TypeAlias

from pliant.errors import PlanError
from pliant.planning.journal import key_of
from pliant.planning.plan_space import PlanSpace
from pliant.plans import Plan

Candidate: TypeAlias = dict[str, Any]


class FittedSpace:
    """fit: a plan -> the plan with fitted rows, or None where it cannot have them. toggled: how often a mutation only
    fits, or takes away a fit."""

    def __init__(self, inner: PlanSpace, fit: Callable[[Plan], Plan | None], toggled: float = 0.0) -> None:
        self.inner, self.fit, self.toggled = inner, fit, toggled
        self._plans: dict[str, Plan] = {}

    def sample(self, rng: Random) -> Candidate:
        return self._bred(self.inner.sample(rng))

    def mutate(self, value: Candidate, rng: Random) -> Candidate:
        if rng.random() < self.toggled and not has_rows(value):
            return bare(value) if is_fitted(value) else fitted(value)
        return self._bred(self.inner.mutate(bare(value), rng), value)

    def cross(self, a: Candidate, b: Candidate, rng: Random) -> Candidate:
        return self._bred(self.inner.cross(bare(a), bare(b), rng), a, b)

    def repair(self, value: Candidate, rng: Random) -> Candidate | None:
        plain = bare(value)
        found = self.inner.repair(plain, rng)
        if found is None:
            return None
        return found if found == plain and not is_fitted(value) else self._bred(found, value)

    def decode(self, candidate: Candidate) -> Plan:
        """Raises PliantError for what cannot run."""
        if not is_fitted(candidate):
            return self.inner.decode(candidate)
        key = key_of(candidate)
        if key not in self._plans:
            plan = self.inner.decode(bare(candidate))
            found = self.fit(plan)
            if found is not None and not self.inner.task.fits(found):
                found = None  # more coefficients are more sums, which count where the budget is a time
            if found is None and has_rows(candidate):
                raise PlanError("its coefficients belong to other steps, and it cannot have its own")
            self._plans[key] = found or plan
        return self._plans[key]

    def _bred(self, child: Candidate, *parents: Candidate) -> Candidate:
        return fitted(child) if has_rows(child) or any(map(is_fitted, parents)) else child


def fitted(value: Candidate) -> Candidate:
    return {**value, "fitted": True}


def bare(value: Candidate) -> Candidate:
    return {k: v for k, v in value.items() if k != "fitted"}


def is_fitted(value: Candidate) -> bool:
    return bool(value.get("fitted"))


def has_rows(value: Candidate) -> bool:
    """Whether the plan itself, before it is fitted, has rows that were fitted elsewhere."""
    return any(step["solver"]["name"] == "rows" for step in value["plan"]["steps"])

"""Steps given as numbers: what a learned solver or an imported scheduler compiles to (sheet D, 14.3, "raw rows").

A step evaluates the network one or more times; after each call the next state is a combination of the newest states
that were evaluated, of the newest outputs, and of fresh noise. Any linear sampler with a short memory is such a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pliant.errors import PlanError
from pliant.solvers.builder import ProgramBuilder, Stored
from pliant.solvers.solver import Solver

Stage: TypeAlias = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
"""Coefficients of (evaluated states, outputs), both newest first, and of fresh noises."""

MEMORY = 6
"""How many evaluations back a stage may reach."""


@dataclass(frozen=True)
class Rows(Solver):
    """One step of raw coefficients, for the prediction kind the network has.

    stages: one (states, outputs, noises) triple per network call; the last one makes the state at the end of the step,
    earlier ones make what the next call of this step sees, at the same time. start: factor on the state before the
    first call.
    """

    stages: tuple[Stage, ...] = (((1.0,), (0.0,), ()),)
    start: float = 1.0

    def __post_init__(self) -> None:
        stages = tuple(_stage(s) for s in self.stages)
        if not stages:
            raise PlanError("rows needs at least one stage: (states, outputs, noises)")
        object.__setattr__(self, "stages", stages)

    @property
    def name(self) -> str:
        return "rows"

    @property
    def form(self) -> str:
        return "rows"

    @property
    def convergence(self) -> int:
        """Numbers without a rule behind them converge to nothing in particular."""
        return 0

    @property
    def evaluations_per_step(self) -> int:
        return len(self.stages)

    @property
    def stochastic(self) -> bool:
        return any(c != 0.0 for stage in self.stages for c in stage[2])

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        here, there = builder.nodes[i], builder.nodes[i + 1]
        if self.start != 1.0:
            builder.advance(builder.combine(here, x={builder.state: self.start}))
        for k, (states, outputs, noises) in enumerate(self.stages):
            builder.remember(builder.evaluate(here))
            known = [h for h in builder.history if isinstance(h, Stored)]
            reach = max(len(states), len(outputs))
            if reach > len(known):
                raise PlanError(f"step {i} refers to {reach} network calls, but only {len(known)} came before")
            x: dict[int, float] = {}
            for coefficient, held in zip(states, known, strict=False):
                x[held.state] = x.get(held.state, 0.0) + coefficient
            m = {held.out: coefficient for coefficient, held in zip(outputs, known, strict=False)}
            z = {builder.noise(): coefficient for coefficient in noises if coefficient != 0.0}
            target = there if k == len(self.stages) - 1 else here
            builder.advance(builder.combine(target, x=x, m=m, z=z))


def _stage(stage: Sequence[Sequence[float]]) -> Stage:
    if len(stage) != 3 or max(len(stage[0]), len(stage[1])) > MEMORY:
        raise PlanError(f"a stage of rows is (states, outputs, noises), the first two at most {MEMORY} long")
    states, outputs, noises = (tuple(float(c) for c in part) for part in stage)
    return states, outputs, noises

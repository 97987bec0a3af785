"""rfpp's sampler update (arXiv 2405.20320): every step starts again from the noise the sample began with.

`x_{t'} = alpha(t') x0_hat + sigma(t') eps_1` with eps_1 of the very first call (Euler keeps the current noise
estimate). On a straight flow it is exact, like Euler; on a curved one it is no discretisation of the ODE at all: its
error does not fall with the number of steps. No planner offers it; more than four steps are worth nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from pliant.errors import PlanError
from pliant.solvers.builder import ProgramBuilder, Stored
from pliant.solvers.solver import Solver


@dataclass(frozen=True)
class Renoise(Solver):
    """One call per step; for models known to be straight."""

    form = "sample"
    convergence = 0
    """None: see above."""

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        if builder.increasing:
            raise PlanError("renoise starts every step from noise, so it cannot run from data to noise; use euler")
        held, target = builder.output(i), builder.nodes[i + 1]
        rows = builder.rows(target.alpha, held, "sample")
        if target.sigma != 0.0:
            rows += builder.rows(target.sigma, Stored(0, builder.nodes[0], 0), "epsilon")
        builder.advance(builder.combine_rows(target, {}, rows, mu=target.beta))

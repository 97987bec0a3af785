"""Heun's corrector with kept slopes: FlowTurbo's full and pseudo-corrected steps (arXiv 2409.18128; sheet C, 7)."""

from __future__ import annotations

from dataclasses import dataclass

from pliant.solvers.builder import ProgramBuilder
from pliant.solvers.solver import Solver


@dataclass(frozen=True)
class PredictCorrect(Solver):
    """Euler to the end of the step, the slope there, and the step again with the mean of both slopes; second order.

    reuse: the slope at the start is the one that the step before evaluated at its *predicted* end ("pec", FlowTurbo's
    pseudo corrector, one call a step); else it is evaluated anew ("pece", Heun's method, two calls, which leaves its
    second slope to a following pec).
    """

    form = "velocity"
    convergence = 2

    reuse: bool = False

    @property
    def evaluations_per_step(self) -> int:
        return 1 if self.reuse else 2

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        s, t = builder.nodes[i], builder.nodes[i + 1]
        first = builder.output(i) if self.reuse else builder.evaluate(s)
        h, base = t.t - s.t, {builder.state: 1.0}
        predicted = builder.combine_rows(t, base, builder.rows(h, first, "velocity"))
        if t.sigma == 0.0 and builder.stored != "velocity":  # other predictions do not say a velocity at clean data
            builder.advance(predicted)
            return
        second = builder.evaluate(t, state=predicted)
        rows = [*builder.rows(0.5 * h, first, "velocity"), *builder.rows(0.5 * h, second, "velocity")]
        builder.advance(builder.combine_rows(t, base, rows))
        builder.remember(second)

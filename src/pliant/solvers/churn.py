"""EDM's stochastic sampler: raise the noise a little, then take a deterministic step (sheet D, 13.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pliant.errors import PlanError, suggest
from pliant.solvers.builder import ProgramBuilder, nodes_of
from pliant.solvers.program import Node
from pliant.solvers.runge_kutta import EULER, TABLEAUS, emit_tableau
from pliant.solvers.solver import Solver


@dataclass(frozen=True)
class Churn(Solver):
    """EDM's Algorithm 2 (arXiv 2206.00364): `sigma^ = sigma (1 + min(churn/N, sqrt(2)-1))` where low <= sigma <= high.

    churn, low, high: S_churn, S_tmin, S_tmax in units of sigma/alpha; noise: S_noise. The defaults are EDM's for
    ImageNet-64. method: the step after the noise, "heun" (default) or "euler". The raised level ends at the path's
    noisiest point; N is the number of steps of the grid.
    """

    form = "epsilon-rho"

    churn: float = 40.0
    low: float = 0.05
    high: float = 50.0
    noise: float = 1.003
    method: str = "heun"

    def __post_init__(self) -> None:
        if self.method not in TABLEAUS:
            raise PlanError(f"unknown Runge-Kutta method {self.method!r}: {suggest(self.method, TABLEAUS)}")
        if not (self.churn >= 0.0 and self.noise >= 0.0 and 0.0 <= self.low <= self.high):
            raise PlanError("edm-churn needs churn >= 0, noise >= 0 and 0 <= low <= high")

    @property
    def convergence(self) -> int:
        return TABLEAUS[self.method].order

    @property
    def evaluations_per_step(self) -> int:
        return len(TABLEAUS[self.method].c)

    @property
    def stochastic(self) -> bool:
        return self.churn > 0.0

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        s, t, tableau = builder.nodes[i], builder.nodes[i + 1], TABLEAUS[self.method]
        if s.alpha == 0.0:
            raise PlanError(
                f"edm-churn cannot leave t={s.t:g}, where alpha is 0; start slightly inside, e.g. at t=0.999"
            )
        if t.sigma == 0.0 and 1.0 in tableau.c:
            tableau = EULER
        ratio = s.sigma / s.alpha
        gamma = min(self.churn / builder.steps, math.sqrt(2.0) - 1.0) if self.low <= ratio <= self.high else 0.0
        if gamma == 0.0:
            emit_tableau(builder, i, tableau, self.form)
            return
        raised = _raised(builder, ratio * (1.0 + gamma), s)
        # x/alpha gains independent noise of variance sigma^^2 - sigma^2.
        added = raised.alpha * math.sqrt(max((raised.sigma / raised.alpha) ** 2 - ratio**2, 0.0)) * self.noise
        builder.state = builder.combine(
            raised, x={builder.state: raised.alpha / s.alpha}, z={builder.noise(): added},
            mu=raised.beta - raised.alpha / s.alpha * s.beta,
        )  # fmt: skip
        emit_tableau(builder, i, tableau, self.form, source=raised)


def _raised(b: ProgramBuilder, ratio: float, s: Node) -> Node:
    """The node with this noise ratio, or the path's noisiest; paths that go on beyond t = 1 have `time_of_sigma`."""
    beyond = getattr(b.path, "time_of_sigma", None)
    node = nodes_of(b.path, [float(beyond(ratio))])[0] if beyond else b.node_at("epsilon-rho", ratio)
    return node if node.alpha > 0.0 and node.sigma * s.alpha >= s.sigma * node.alpha else s

"""Jumps of flow maps: one call that was told where it lands, then (optionally) fresh noise (CTM, arXiv 2310.02279)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pliant.errors import PlanError
from pliant.solvers.builder import ProgramBuilder
from pliant.solvers.coefficients import finite_form
from pliant.solvers.program import Node
from pliant.solvers.solver import Solver


@dataclass(frozen=True)
class Jump(Solver):
    """The deterministic jump to a cleaner time and back up with fresh noise: CTM's gamma-sampling.

    From noise ratio n_s to n_t it lands at `sqrt(1 - gamma^2) n_t` and adds noise of `gamma n_t` (in units of
    sigma/alpha). gamma 0 (default): the long jumps of a flow map alone. 1: consistency sampling, always to clean data
    and back. The jump is DDIM's step, on the linear path `x_s = x_t - (t - s) u`; the network is told both its ends, so
    the step discretises nothing: it is as exact as the network. A network that is not told where it lands takes `ddim`
    or, for gamma 1, `flow-stochastic`.
    """

    form = "sample"

    gamma: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:
            raise PlanError(f"jump's gamma lies between 0 (no noise) and 1 (consistency sampling), got {self.gamma}")

    @property
    def convergence(self) -> int:
        return 0 if self.stochastic else 1  # of a network that is not told, where it is ddim

    @property
    def stochastic(self) -> bool:
        return self.gamma > 0.0

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        s, t = builder.nodes[i], builder.nodes[i + 1]
        landing = self._landing(builder, t)
        output = builder.evaluate(s, lands=landing.t)
        builder.remember(output)
        state = builder.transfer(finite_form("sample", s, landing), landing, [output], base=(builder.state, s))
        if landing is not t:
            scale = t.alpha / landing.alpha
            added = self.gamma * t.sigma
            mu = t.beta - scale * landing.beta
            state = builder.combine(t, x={state: scale}, z={builder.noise(): added}, mu=mu)
        builder.advance(state)

    def _landing(self, builder: ProgramBuilder, t: Node) -> Node:
        """Where the network jumps to on the way to t; t itself if no noise is added."""
        if self.gamma == 0.0 or t.sigma == 0.0:
            return t
        if t.alpha == 0.0:
            raise PlanError(f"jump with gamma > 0 cannot arrive at t={t.t:g}, where alpha is 0")
        return builder.node_at("epsilon-rho", math.sqrt(1.0 - self.gamma**2) * t.sigma / t.alpha)

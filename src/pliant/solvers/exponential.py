"""Exponential integrators in half log-SNR: DDIM and DPM-Solver++ (sheet D, section 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pliant.errors import PlanError
from pliant.solvers.builder import ProgramBuilder
from pliant.solvers.coefficients import depth_of_eta
from pliant.solvers.fits import Fit, get_fit
from pliant.solvers.solver import Solver


def emit_multistep(b: ProgramBuilder, i: int, order: int, form: str, fit: str | Fit, depth: float = 0.0) -> None:
    """Evaluate at node i, then extrapolate through the newest `order` outputs to node i+1.

    The order drops by itself while there is too little history and where the step is infinite in log-SNR.
    """
    s, t = b.nodes[i], b.nodes[i + 1]
    b.remember(b.evaluate(s))
    if s.sigma == 0.0 and form == "sample":
        form = "epsilon"  # leaving data (inversion): the same first-order map, in the form that is finite there
    outputs = b.usable(form, s, t, order)
    b.advance(b.transfer(form, t, outputs, base=(b.state, s), fit=fit, depth=depth))


@dataclass(frozen=True)
class DDIM(Solver):
    """DDIM (arXiv 2010.02502): first order, exact when the prediction is constant over the step.

    eta: 0 (default) follows the ODE; 1 is ancestral sampling with the posterior variance; between, a mixture.
    """

    name: ClassVar[str] = "ddim"
    order: ClassVar[int] = 1

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise PlanError(f"ddim's eta lies between 0 (deterministic) and 1 (ancestral), got {self.eta}")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0.0

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        depth = depth_of_eta(self.eta, builder.nodes[i], builder.nodes[i + 1])
        emit_multistep(builder, i, order=1, form="sample", fit="lagrange", depth=depth)


@dataclass(frozen=True)
class DPMSolverPP2M(Solver):
    """DPM-Solver++(2M) (arXiv 2211.01095): second order from one call per step, in x0 form.

    fit: "midpoint" (published and diffusers' default) or "lagrange" (diffusers' "heun"); both are second
    order. lower_order_final: make the last step first order even when it ends above sigma = 0 (diffusers does
    so below 15 steps); a last step to sigma = 0 always is.
    """

    name: ClassVar[str] = "dpmpp-2m"
    order: ClassVar[int] = 2

    fit: str = "midpoint"
    lower_order_final: bool = False

    def __post_init__(self) -> None:
        get_fit(self.fit)

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        last = i == builder.steps - 1 and self.lower_order_final
        emit_multistep(builder, i, order=1 if last else 2, form="sample", fit=self.fit)

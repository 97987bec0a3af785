"""Multistep solvers: one call per step, extrapolated through earlier ones (sheet D, sections 1, 10 and 13.2).

Which prediction is interpolated, in which variable (`form`), and by which rule (`fit`) makes DPM-Solver, DPM-Solver++,
their SDE versions, DEIS, LMS, Adams-Bashforth on flows and MR-Sampler out of the same lines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from pliant.errors import PlanError
from pliant.solvers.builder import ProgramBuilder
from pliant.solvers.coefficients import depth_of_eta, depth_of_tau, finite_form, get_form
from pliant.solvers.fits import Fit, get_fit
from pliant.solvers.solver import Solver

MAX_ORDER = 6
Taper: TypeAlias = bool | int | str


def check_order(order: int, highest: int, name: str) -> None:
    """Raise PlanError unless `order` is a whole number from 1 to `highest`."""
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= highest:
        raise PlanError(f"{name} has orders 1 to {highest}, got {order!r}")


def check_taper(rule: Taper) -> None:
    if rule != "auto" and not isinstance(rule, int):
        raise PlanError(f"lower_order_final is 'auto', true, false or a number of steps, got {rule!r}")


def tapered(order: int, b: ProgramBuilder, i: int, rule: Taper, few: int) -> int:
    """The order of step i where the last steps are taken at lower orders (..., 3, 2, 1).

    rule: True always, False never, a number n on grids of fewer than n steps (10: DPM-Solver's code, 15: diffusers).
    "auto": on grids of fewer than `few` steps that end at sigma = 0, where the last step is first order anyway.
    """
    if rule == "auto":
        apply = b.nodes[-1].sigma == 0.0 and b.steps < few
    else:
        apply = rule if isinstance(rule, bool) else b.steps < int(rule)
    return min(order, b.steps - i) if apply else order


def emit_multistep(b: ProgramBuilder, i: int, order: int, form: str, fit: str | Fit, depth: float = 0.0) -> None:
    """Evaluate at node i, then extrapolate through the newest `order` outputs to node i+1.

    The order drops by itself while there is too little history and where the step is infinite in the form's variable.
    """
    s, t = b.nodes[i], b.nodes[i + 1]
    b.output(i)
    form = finite_form(form, s, t)
    outputs = b.usable(form, s, t, order)
    b.advance(b.transfer(form, t, outputs, base=(b.state, s), fit=fit, depth=depth))


@dataclass(frozen=True)
class DDIM(Solver):
    """DDIM (arXiv 2010.02502): first order, exact when the prediction is constant over the step.

    eta: 0 (default) follows the ODE; 1 is ancestral sampling with the posterior variance; between, a mixture.
    """

    form = "sample"
    convergence = 1

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
class Multistep(Solver):
    """A polynomial through the newest `order` outputs, integrated exactly: one call per step.

    form: what is interpolated: "sample" (DPM-Solver++), "epsilon" (DPM-Solver, DEIS), "epsilon-rho" (LMS), "velocity"
    (Adams-Bashforth in t) or "angle" (v-prediction). fit: "midpoint" (DPM-Solver's published two-node rule, lagrange
    beyond), "lagrange" (the full polynomial; diffusers' "heun" at order 2, DEIS), "published3" (third order as in the
    paper's code and diffusers: converges like h^2), "mr-sampler", or "diffusers-sde3" (bit-compatible defect). tau: 0
    the ODE, 1 the reverse SDE, any between or above. lower_order_final: see `tapered`.
    """

    order: int = 2
    form: str = "sample"
    fit: str = "midpoint"
    tau: float = 0.0
    lower_order_final: Taper = "auto"

    def __post_init__(self) -> None:
        check_order(self.order, MAX_ORDER, "a multistep solver")
        check_taper(self.lower_order_final)
        get_form(self.form)
        get_fit(self.fit)
        if not 0.0 <= self.tau < math.inf:
            raise PlanError(f"tau is 0 (the ODE), 1 (the reverse SDE) or any positive number, got {self.tau}")
        if self.tau > 0.0 and self.form not in ("sample", "epsilon"):
            raise PlanError(f"only the sample and epsilon forms have a stochastic version, not {self.form!r}")
        if self.fit == "diffusers-sde3" and (self.form, self.tau) != ("sample", 1.0):
            raise PlanError("the fit 'diffusers-sde3' reproduces one scheduler: use it with form 'sample' and tau 1")

    @property
    def convergence(self) -> int:
        if self.order == 3 and self.fit == "diffusers-sde3":
            return 1
        if self.stochastic or (self.order == 3 and self.fit in ("published3", "mr-sampler")):
            return min(self.order, 2)  # the polynomial does not see the noise that enters within a step
        return self.order

    @property
    def stochastic(self) -> bool:
        return self.tau > 0.0

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        rule = self.lower_order_final
        if rule == "auto" and self.form not in ("sample", "epsilon"):
            rule = False  # only forms in log-SNR end with a first-order step that lower orders could lead up to
        order = tapered(self.order, builder, i, rule, few=10)
        depth = depth_of_tau(self.tau, builder.nodes[i], builder.nodes[i + 1])
        emit_multistep(builder, i, order, self.form, self.fit, depth)

"""The coefficient builder (sheet D, 14.3): every multistep, singlestep and Runge-Kutta update in one formula.

A step from node s to node t in a *form* P (which prediction is interpolated, in which variable u) reads

    x_t = a * x_s + b * sum_j w_j P_j + noise * z        (outputs j at nodes with offset nu_j = u_j - u_s)

where the weights w integrate a polynomial through the P_j against the form's exponential weight function.
Solvers differ only in the form, in the nodes and in the fit rule that turns moments into weights. Plain
floats throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import PlanError, suggest
from pliant.paths import Path, PredictionType
from pliant.solvers.fits import FITS, Fit, Pseudo, get_fit, moments
from pliant.solvers.program import Node

_MAX_NODES = 6  # a Vandermonde system beyond this is not trustworthy in float64


@dataclass(frozen=True)
class Transfer:
    """A step of one form before weights: `x_t = a*x_s + b*sum(w*P) + noise*z`.

    h: step in the form's variable (infinite when an end has sigma = 0 or alpha = 0). decay: exponent of the
    weight function; it and b mean something only where h is finite (nan elsewhere). total: `b*M_0` in closed form,
    finite even when h is not: what a first-order step multiplies its output with.
    """

    a: float
    b: float
    noise: float
    h: float
    decay: float
    total: float


@dataclass(frozen=True)
class Form:
    """Which prediction is interpolated (`kind`), in which variable, with which exponential transfer."""

    name: str
    kind: PredictionType
    variable: Callable[[Node], float]
    time: Callable[[Path, Tensor], Tensor]  # inverse of the variable, vectorised
    step: Callable[[Node, Node, float, float], Transfer]  # (s, t, h, depth)


def _data_step(s: Node, t: Node, h: float, depth: float) -> Transfer:
    """x0 form: `x_t = (sigma_t/sigma_s) e^-depth x_s + alpha_t int c e^(-c(h-u)) x0 du`, c*h = h + depth."""
    if s.sigma == 0.0:
        raise PlanError(f"the sample form cannot leave t={s.t:g}, where sigma is 0; use the epsilon or velocity form")
    a = t.sigma / s.sigma * math.exp(-depth)
    noise = t.sigma * math.sqrt(max(-math.expm1(-2.0 * depth), 0.0))
    if not (math.isfinite(h) and math.isfinite(depth)):  # at an end of the path, or all noise is fresh
        return Transfer(a, math.nan, noise, math.copysign(math.inf, h), math.nan, t.alpha - s.alpha * a)
    c = 1.0 + depth / h
    return Transfer(a, t.alpha * c, noise, h, c, -t.alpha * math.expm1(-(h + depth)))


def _noise_step(s: Node, t: Node, h: float, depth: float) -> Transfer:
    """eps form: `x_t = (alpha_t/alpha_s) x_s - (1+tau^2) sigma_t int e^(h-u) eps du`, tau^2 = depth/h."""
    if s.alpha == 0.0:
        raise PlanError(f"the epsilon form cannot leave t={s.t:g}, where alpha is 0; use the sample or velocity form")
    a = t.alpha / s.alpha
    if not math.isfinite(h):
        if depth != 0.0:
            raise PlanError(f"a stochastic step in epsilon form cannot reach t={t.t:g}; use the sample form")
        return Transfer(a, math.nan, 0.0, h, math.nan, t.sigma - s.sigma * a)
    scale = 1.0 + depth / h
    noise = t.sigma * math.sqrt(depth / h * math.expm1(2.0 * h)) if depth != 0.0 else 0.0
    return Transfer(a, -scale * t.sigma, noise, h, -1.0, -scale * t.sigma * math.expm1(h))


def _plain_step(s: Node, t: Node, h: float, depth: float) -> Transfer:
    """dx/du = P with no transfer: velocity in t, or v-prediction in the angle."""
    _refuse_noise(depth)
    return Transfer(1.0, 1.0, 0.0, h, 0.0, h)


def _ratio_step(s: Node, t: Node, h: float, depth: float) -> Transfer:
    """dy/drho = eps for y = x/alpha, rho = sigma/alpha: exact for every linear path."""
    _refuse_noise(depth)
    if s.alpha == 0.0 or t.alpha == 0.0:
        raise PlanError("the epsilon-rho form does not exist where alpha is 0; use the sample or velocity form")
    return Transfer(t.alpha / s.alpha, t.alpha, 0.0, h, 0.0, t.alpha * h)


def _angle_step(s: Node, t: Node, h: float, depth: float) -> Transfer:
    """dx/dtheta = v holds only on variance-preserving paths."""
    for node in (s, t):
        if abs(node.alpha**2 + node.sigma**2 - 1.0) > 1e-9:
            raise PlanError("the angle form needs alpha^2 + sigma^2 = 1; use the velocity or sample form on this path")
    return _plain_step(s, t, h, depth)


def _refuse_noise(depth: float) -> None:
    if depth != 0.0:
        raise PlanError("only the sample and epsilon forms have a stochastic version; use one of those")


def _log_snr(node: Node) -> float:
    return node.log_snr


def _time_of_log_snr(path: Path, log_snr: Tensor) -> Tensor:
    return path.time_of_log_snr(log_snr)


def _ratio(node: Node) -> float:
    return node.sigma / node.alpha if node.alpha else math.inf


def _angle(node: Node) -> float:
    return math.atan2(node.sigma, node.alpha)


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("sample", "sample", _log_snr, _time_of_log_snr, _data_step),
        Form("epsilon", "epsilon", _log_snr, _time_of_log_snr, _noise_step),
        Form("velocity", "velocity", lambda n: n.t, lambda path, u: u, _plain_step),
        Form("epsilon-rho", "epsilon", _ratio, lambda path, u: path.time_of_noise_ratio(u), _ratio_step),
        Form("angle", "v_prediction", _angle, lambda path, u: path.time_of_noise_ratio(torch.tan(u)), _angle_step),
    )
}


def get_form(form: str) -> Form:
    """A form by name. Raises PlanError with the nearest one."""
    if form not in FORMS:
        raise PlanError(f"unknown solver form {form!r}: {suggest(form, FORMS)}")
    return FORMS[form]


def finite_form(form: str, s: Node, t: Node) -> str:
    """`form`, or at an end of the path where it does not exist, the one whose first-order step is the same map there.

    Leaving sigma = 0 (inversion) the sample form gives way to epsilon; where alpha = 0 the forms in epsilon give way to
    sample (leaving) or epsilon in log-SNR (arriving). `order_allowed` then says 1.
    """
    if s.sigma == 0.0 and form == "sample":
        return "epsilon"
    if s.alpha == 0.0 and form in ("epsilon", "epsilon-rho"):
        return "sample"
    if t.alpha == 0.0 and form == "epsilon-rho":
        return "epsilon"
    return form


def depth_of_eta(eta: float, s: Node, t: Node) -> float:
    """DDIM's eta (0 = ODE, 1 = ancestral) as depth tau^2*h: `exp(-2*depth) = 1 - eta^2 (1 - exp(-2h))`."""
    if eta == 0.0 or t.sigma == 0.0:
        return 0.0
    inside = eta**2 * math.expm1(-2.0 * (t.log_snr - s.log_snr))
    return math.inf if inside <= -1.0 else -0.5 * math.log1p(inside)


def depth_of_tau(tau: float, s: Node, t: Node) -> float:
    """Constant tau over the step (0 = ODE, 1 = reverse SDE) as noise depth. Zero when arriving at sigma =
    0.
    """
    return 0.0 if tau == 0.0 or t.sigma == 0.0 else tau**2 * (t.log_snr - s.log_snr)


def order_allowed(form: Form, s: Node, t: Node, nodes: Sequence[Node]) -> int:
    """How many of `nodes` (newest first) can be interpolated on the step s -> t.

    1 when the step is infinite in the form's variable (arriving at sigma = 0, leaving alpha = 0); history at
    infinite places or (nearly) repeated nodes end the list (sheet D, 14.3 step 5 and 14.9).
    """
    base = form.variable(s)
    length = form.variable(t) - base  # only whether it is finite, and its size as a scale
    if not math.isfinite(length):
        return 1
    places: list[float] = []
    for node in nodes[:_MAX_NODES]:
        u = form.variable(node)
        if not math.isfinite(u) or any(abs(u - other) < 1e-6 * abs(length) for other in places):
            break
        places.append(u)
    return max(len(places), 1)


def step_weights(
    form: Form, s: Node, t: Node, nodes: Sequence[Node], fit: str | Fit = "lagrange", depth: float = 0.0
) -> tuple[Transfer, list[float]]:
    """The step s -> t and the coefficient `b*w_j` of each output in the form's own prediction kind.

    nodes: where the outputs were evaluated, newest first. Raises PlanError if the form cannot make the step.
    """
    base = form.variable(s)
    h = form.variable(t) - base
    step = form.step(s, t, h, depth)
    rule = get_fit(fit)
    if rule in FITS.values() and len(nodes) == 1:
        return step, [step.total]  # order 1, in the form that survives infinite h
    if isinstance(rule, Pseudo):
        return step, rule.shares(step.total, len(nodes))
    if not math.isfinite(step.h):
        raise PlanError(f"the step from t={s.t:g} to t={t.t:g} is infinite in log-SNR: only a first-order step exists")
    weights = rule(moments(h, step.decay, len(nodes)), h, [form.variable(n) - base for n in nodes])
    return step, [step.b * w for w in weights]

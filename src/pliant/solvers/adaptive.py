"""Step sizes chosen while sampling. The accepted steps are recorded and make a static plan that replays them.

DPM-Solver-12 and -23 (sheet D, 1.10) use the same builder and interpreter as every other solver; dopri5 and bosh3 are
torchdiffeq's (extra "ode").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.errors import PlanError, suggest
from pliant.paths import AlphaSigma, Path, PredictionType, conversion
from pliant.solvers.builder import ProgramBuilder, nodes_of
from pliant.solvers.interpreter import Evaluate, combine, run
from pliant.solvers.program import Eval, Node
from pliant.solvers.runge_kutta import RungeKutta
from pliant.solvers.singlestep import Singlestep, emit_singlestep
from pliant.solvers.solver import Solver


@dataclass(frozen=True)
class Recorded:
    """A finished adaptive run: the sample and the decisions that made it.

    times, solvers: what `compile_program` needs to repeat the accepted steps. rejected: attempts that were thrown away.
    evaluations: all network calls, those of rejected attempts too.
    """

    x: Tensor
    times: tuple[float, ...]
    solvers: tuple[Solver, ...]
    rejected: int
    evaluations: int


def dpm_adaptive(
    path: Path,
    x: Tensor,
    evaluate: Evaluate,
    stored: PredictionType,
    start: float,
    end: float,
    *,
    order: int = 3,
    form: str = "epsilon",
    fit: str = "midpoint",
    first: float = 0.05,
    atol: float = 0.0078,
    rtol: float = 0.05,
    safety: float = 0.9,
    max_steps: int = 10_000,
) -> Recorded:
    """DPM-Solver-12 (order 2) or -23 (order 3) from house time `start` to `end`, both with finite log-SNR.

    x: (B, ...). evaluate: as for `run`. first: the first step in log-SNR. An attempt is accepted if the root mean
    square of (high - low)/max(atol, rtol*max(|low|, |previous low|)) is at most 1 for every sample.
    Raises PlanError for an order other than 2 or 3, ends without a finite log-SNR, or more than `max_steps` attempts.
    """
    if order not in (2, 3):
        raise PlanError(f"the adaptive DPM-Solver has orders 2 (DPM-Solver-12) and 3 (-23), got {order!r}")
    solver = Singlestep(order, form, fit, (0.5,) if order == 2 else (1 / 3, 2 / 3))
    s, last = nodes_of(path, [start, end])
    if not (math.isfinite(s.log_snr) and math.isfinite(last.log_snr)):
        raise PlanError(f"the adaptive DPM-Solver needs a finite log-SNR at both ends, t={start:g} and t={end:g}")
    sign = math.copysign(1.0, last.log_snr - s.log_snr)
    h, times, rejected = first, [start], 0
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    previous = x
    while times[-1] != end:
        if len(times) + rejected > max_steps:
            raise PlanError(f"no end after {max_steps} attempts at t={times[-1]:g}; loosen atol and rtol")
        left = abs(last.log_snr - s.log_snr)
        t = end if h >= left * (1.0 - 1e-9) else float(path.time_of_log_snr(s.log_snr + sign * h))
        high, low = _attempt(path, x, evaluate, stored, (times[-1], t), solver)
        scale = torch.clamp(rtol * torch.maximum(low.abs(), previous.abs()), min=atol)
        error = float((((high - low) / scale) ** 2).flatten(1).mean(1).sqrt().max())
        if error <= 1.0:
            x, previous = high, low
            times.append(t)
            s = nodes_of(path, [t])[0]
        else:
            rejected += 1
        error = max(error, 1e-12)  # a step of zero error may grow, but not without bound
        h = safety * min(h, left) * error ** (-1.0 / order)
    attempts = len(times) - 1 + rejected
    return Recorded(x, tuple(times), (solver,) * (len(times) - 1), rejected, attempts * order)


def _attempt(
    path: Path, x: Tensor, evaluate: Evaluate, stored: PredictionType, times: tuple[float, float], solver: Singlestep
) -> tuple[Tensor, Tensor]:
    """(high, low) order results of one step; they share their stages."""
    b = ProgramBuilder(path, times, stored)
    low, high = emit_singlestep(b, 0, solver.order, solver.form, solver.fit, solver.inner, also_lower=True)
    b.advance(high)
    b.close_step("high")
    # A second step holds the difference, so that one run gives both.
    b.advance(b.combine(b.nodes[1], x={high: 1.0, low: -1.0}))
    b.close_step("difference")
    best, difference = (result.x for result in run(b.finish(), x, evaluate))
    return best, best - difference


_TABLEAU_OF = {"dopri5": "dormand-prince-5", "bosh3": "bogacki-shampine-3"}


def ode_adaptive(
    path: Path,
    x: Tensor,
    evaluate: Evaluate,
    stored: PredictionType,
    start: float,
    end: float,
    *,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Recorded:
    """The probability-flow ODE by torchdiffeq's `dopri5` or `bosh3`, between house times `start` and `end`.

    The velocity must be finite at both ends (not so on variance-preserving paths at t = 0). The recorded plan repeats
    the accepted steps with the same tableau. Raises PlanError for another method, an end without a velocity, or where
    torchdiffeq is not installed.
    """
    if method not in _TABLEAU_OF:
        raise PlanError(f"no adaptive method {method!r}: {suggest(method, _TABLEAU_OF)}")
    for node in nodes_of(path, [start, end]):
        if not all(map(math.isfinite, _velocity_row(stored, node))):
            raise PlanError(f"at t={node.t:g} a {stored} prediction gives no finite velocity; stay slightly inside")
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise PlanError(f"{method} needs torchdiffeq: pip install 'pliant[ode]'") from None
    sign = math.copysign(1.0, end - start)
    field = _Field(path, evaluate, stored, start, sign)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    span = torch.tensor([0.0, abs(end - start)], dtype=torch.float64)
    # torchdiffeq would step past the end and interpolate back; `step_t` makes it land there.
    options: dict[str, Any] = {"step_t": span[1:], "dtype": torch.float64}
    _, found = odeint(field, x, span, rtol=rtol, atol=atol, method=method, options=options)
    times = (*(start + sign * u for u in field.accepted), end)
    solver = RungeKutta(_TABLEAU_OF[method], "velocity", "full")
    return Recorded(found.to(x.dtype), times, (solver,) * (len(times) - 1), field.rejected, field.calls)


class _Field:
    """dx/du at `start + sign*u`, u from 0 upwards; counts calls and remembers accepted steps for torchdiffeq."""

    def __init__(self, path: Path, evaluate: Evaluate, stored: PredictionType, start: float, sign: float) -> None:
        self.path, self.evaluate, self.stored, self.start, self.sign = path, evaluate, stored, start, sign
        self.calls = self.rejected = 0
        self.accepted: list[float] = []
        self.callback_accept_step: Callable[[Tensor, Tensor, Tensor], None] = self._accept
        self.callback_reject_step: Callable[[Tensor, Tensor, Tensor], None] = self._reject

    def __call__(self, u: Tensor, x: Tensor) -> Tensor:
        (node,) = nodes_of(self.path, [self.start + self.sign * float(u)])
        value = self.evaluate(x, Eval(self.calls, 0, node, step=0)).value.to(x.dtype)
        self.calls += 1
        p, q = _velocity_row(self.stored, node)
        return combine([(self.sign * p, x), (self.sign * q, value)], x)

    def _accept(self, u: Tensor, x: Tensor, du: Tensor) -> None:
        self.accepted.append(float(u))

    def _reject(self, u: Tensor, x: Tensor, du: Tensor) -> None:
        self.rejected += 1


def _velocity_row(stored: PredictionType, n: Node) -> tuple[float, float]:
    """(p, q) with `velocity = p*x + q*output`."""
    values = (torch.tensor(v, dtype=torch.float64) for v in (n.alpha, n.sigma, n.dalpha, n.dsigma))
    p, q = conversion(stored, "velocity", AlphaSigma(*values))
    return float(p), float(q)

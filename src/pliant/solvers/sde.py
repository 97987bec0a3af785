"""SiT's stochastic sampler: Euler-Maruyama with a diffusion coefficient chosen after training (sheet A, 4.2).

SiT's code runs its own time tau = 1 - t from noise (0) to data (1):

    dx = (v_tau + D*score) dtau + sqrt(2D) dW.

In house time a step from t_s down to t_t has dtau = t_s - t_t = -h > 0 and v_tau = -v, so

    x_t = x_s + h*v - h*D*score + sqrt(-2*h*D) * z,       h = t_t - t_s < 0.

D depends on where the step starts. Any D >= 0 keeps the marginals in the limit of small steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import PlanError, suggest
from pliant.solvers.builder import ProgramBuilder
from pliant.solvers.program import Node
from pliant.solvers.solver import Solver


def _sbdm(n: Node, norm: float) -> float:
    """Half of the SDE's own beta: `-(alpha'/alpha) sigma^2 + sigma sigma'` (house derivatives)."""
    if n.alpha == 0.0:
        raise PlanError(f"the 'sbdm' diffusion is infinite at t={n.t:g}, where alpha is 0; start at t = 0.999")
    return norm * (n.sigma * n.dsigma - n.dalpha / n.alpha * n.sigma**2)


# Formulas of willisma/SiT:transport/path.py with its time replaced by 1 - t.
DIFFUSIONS: dict[str, Callable[[Node, float], float]] = {
    "constant": lambda n, norm: norm,
    "sbdm": _sbdm,
    "sigma": lambda n, norm: norm * n.sigma,
    "linear": lambda n, norm: norm * n.t,
    "decreasing": lambda n, norm: 0.25 * (1.0 - norm * math.cos(math.pi * n.t)) ** 2,
    "increasing-decreasing": lambda n, norm: norm * math.sin(math.pi * n.t) ** 2,
}
LAST_STEPS = ("mean", "tweedie", "euler")


def sde_times(steps: int, last_size: float = 0.04) -> Tensor:
    """SiT's grid, (steps+1,) float64: steps-1 equal steps from 1 to `last_size`, then one to 0."""
    if steps < 2:
        raise PlanError(f"SiT's grid needs at least 2 steps (its last one is special), got {steps}")
    if not 0.0 < last_size < 1.0:
        raise PlanError(f"the last step size lies between 0 and 1, got {last_size}")
    grid = torch.linspace(1.0, last_size, steps, dtype=torch.float64)
    return torch.cat([grid, torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True)
class SiTSDE(Solver):
    """Euler-Maruyama on the reverse SDE of any path; use `sde_times` for SiT's grid.

    diffusion: name of D (see `DIFFUSIONS`). norm: its factor. last: the step to sigma = 0, without noise:
    "mean" (drift of the SDE, default), "tweedie" (the x0 estimate) or "euler" (drift of the ODE).
    """

    form = "velocity"
    convergence = 1

    diffusion: str = "sigma"
    norm: float = 1.0
    last: str = "mean"

    def __post_init__(self) -> None:
        if self.diffusion not in DIFFUSIONS:
            raise PlanError(f"unknown diffusion {self.diffusion!r}: {suggest(self.diffusion, DIFFUSIONS)}")
        if self.last not in LAST_STEPS:
            raise PlanError(f"unknown last step {self.last!r}: {suggest(self.last, LAST_STEPS)}")
        if not self.norm > 0.0:
            raise PlanError(f"the diffusion's norm must be positive, got {self.norm}")

    @property
    def stochastic(self) -> bool:
        return True

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        s, t = builder.nodes[i], builder.nodes[i + 1]
        last = self.last if t.sigma == 0.0 else None
        output = builder.output(i)
        if last == "tweedie":  # (x + sigma^2 score)/alpha is the x0 estimate
            builder.advance(builder.combine_rows(t, {}, builder.rows(t.alpha, output, "sample")))
            return
        h = t.t - s.t
        drift = builder.rows(h, output, "velocity")
        z: dict[int, float] = {}
        d = 0.0 if last == "euler" else DIFFUSIONS[self.diffusion](s, self.norm)
        if d != 0.0:
            drift += builder.rows(-h * d, output, "score")
            if last is None:
                z[builder.noise()] = math.sqrt(-2.0 * h * d)
        builder.advance(builder.combine_rows(t, {builder.state: 1.0}, drift, z=z))

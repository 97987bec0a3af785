"""Problems with exact answers: Gaussian mixtures, their denoisers for any path, and the exact ODE flow.

Sheet D, section 0: "gmm2d" is the default target of solver tests, "gauss1d" has its flow in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.paths import Path
from pliant.solvers import Eval, Node, Output, Program, run


@dataclass(frozen=True)
class Mixture:
    """x0 ~ sum_k weights_k N(means_k, stds_k^2 I). means: (K, d); weights, stds: (K,). Float64."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def pair(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """(E[x0|x], E[eps|x]) for x (B, d) = alpha*x0 + sigma*eps; exact also at alpha = 0 and sigma = 0."""
        variance = alpha**2 * self.stds**2 + sigma**2  # (K,)
        residual = x[:, None, :] - alpha * self.means  # (B, K, d)
        log_r = self.weights.log() - 0.5 * x.shape[1] * variance.log() - residual.square().sum(-1) / (2 * variance)
        r = torch.softmax(log_r, dim=1)[..., None]
        eps = sigma * (r * residual / variance[:, None]).sum(1)
        clean = (sigma**2 * self.means + alpha * self.stds[:, None] ** 2 * x[:, None, :]) / variance[:, None]
        return (r * clean).sum(1), eps

    def predict(self, kind: str, x: Tensor, n: Node) -> Tensor:
        """The exact prediction of any kind at a node, straight from the definition of the kind."""
        x0, eps = self.pair(x, n.alpha, n.sigma)
        if kind == "sample":
            return x0
        if kind == "epsilon":
            return eps
        if kind == "velocity":
            return n.dalpha * x0 + n.dsigma * eps
        if kind == "v_prediction":
            return n.alpha * eps - n.sigma * x0
        if kind == "score":
            return -eps / n.sigma
        raise ValueError(kind)

    def evaluate(self, program: Program) -> Callable[[Tensor, Eval], Output]:
        """The `evaluate` that `run` wants for this program."""
        return lambda x, ev: Output(self.predict(program.stored, x, ev.node))


GMM2D = Mixture(
    torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
    torch.tensor([[1.0, 0.4], [-0.7, 0.9], [0.1, -1.2]], dtype=torch.float64),
    torch.tensor([0.45, 0.35, 0.6], dtype=torch.float64),
)
GAUSS1D = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([1.0], [[0.3]], [0.7])))


def gaussian(std: float, mean: float = 0.0) -> Mixture:
    """N(mean, std^2) in one dimension."""
    return Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([1.0], [[mean]], [std])))


def gaussian_flow(m: Mixture, x: Tensor, s: Node, t: Node) -> Tensor:
    """The exact ODE map from s to t for a single Gaussian (closed form)."""
    mean, std = m.means[0], float(m.stds[0])
    growth = math.sqrt((t.alpha**2 * std**2 + t.sigma**2) / (s.alpha**2 * std**2 + s.sigma**2))
    return t.alpha * mean + (x - s.alpha * mean) * growth


def exact_flow(m: Mixture, x: Tensor, s: Node, t: Node) -> Tensor:
    """The exact ODE map from s to t for any linear path: `dy/drho = eps(y; 1, rho)`, x = alpha*y. Needs alpha
    > 0.
    """
    from scipy.integrate import solve_ivp

    def slope(rho: float, y: object) -> object:
        state = torch.as_tensor(y, dtype=torch.float64).reshape(x.shape)
        return m.pair(state, 1.0, rho)[1].reshape(-1).numpy()

    start = (x / s.alpha).reshape(-1).numpy()
    span = (s.sigma / s.alpha, t.sigma / t.alpha)
    found = solve_ivp(slope, span, start, method="DOP853", rtol=1e-12, atol=1e-13)
    return torch.as_tensor(found.y[:, -1]).reshape(x.shape) * t.alpha


def start_points(count: int = 8, dim: int = 2, seed: int = 0) -> Tensor:
    """Fixed standard normal start states (count, dim), float64."""
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_of(shape: tuple[int, ...] | torch.Size, seed: int = 0) -> Callable[[int], Tensor]:
    """Slot -> standard normal float64 tensor; the same slot always gives the same tensor."""
    return lambda slot: torch.randn(
        shape, generator=torch.Generator().manual_seed(seed * 100_003 + slot), dtype=torch.float64
    )


def sample(program: Program, m: Mixture, x: Tensor, noise: Callable[[int], Tensor] | None = None) -> Tensor:
    """Run a program with the exact denoiser to its end."""
    for result in run(program, x, m.evaluate(program), noise):
        last = result.x
    return last


def slope(errors: list[float]) -> float:
    """Order of convergence from errors at step counts that double each time (least squares in log2)."""
    logs = [math.log2(e) for e in errors]
    n = len(logs)
    centre = (n - 1) / 2
    return -sum((k - centre) * v for k, v in enumerate(logs)) / sum((k - centre) ** 2 for k in range(n))


def times_between(path: Path, steps: int, first: float, last: float) -> Tensor:
    """(steps+1,) times uniform in log-SNR from `first` (noisy) to `last`."""
    return path.time_of_log_snr(torch.linspace(first, last, steps + 1, dtype=torch.float64))

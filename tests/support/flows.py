"""One-dimensional flows with known answers, and small networks trained on them by the real objectives.

The mixture of sheet C, section 1: two equal modes at +-1.5 of standard deviation 0.4, source N(0, 1), linear path. Maps
are computed to 1e-9 by scipy; the velocity is closed-form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from analytic import Mixture
from pliant.denoiser import Prediction
from pliant.paths import Path, PredictionType, get_path
from pliant.training.draws import Draws
from pliant.training.objectives import Batch, Objective

MODES = Mixture(*(torch.tensor(v, dtype=torch.float64) for v in ([0.5, 0.5], [[1.5], [-1.5]], [0.4, 0.4])))


def exact_velocity(x: Tensor, t: float | Tensor, mixture: Mixture = MODES) -> Tensor:
    """E[x1 - x0 | x_t = x] on the linear path at house time t, for x (B, 1), float64."""
    t = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1)
    alpha, sigma = 1.0 - t, t
    variance = alpha**2 * mixture.stds**2 + sigma**2  # (B or 1, K)
    residual = x - alpha * mixture.means[:, 0]
    log_r = mixture.weights.log() - 0.5 * variance.log() - residual.square() / (2.0 * variance)
    r = torch.softmax(log_r, dim=1)
    # E[x1 - x0 | x, k] = (sigma - alpha sd^2)/variance * residual - mean_k: linear in the Gaussian of each mode.
    slope = (sigma - alpha * mixture.stds**2) / variance
    return (r * (slope * residual - mixture.means[:, 0])).sum(1, keepdim=True)


def exact_map(z: Tensor, mixture: Mixture = MODES) -> Tensor:
    """Where the flow takes noise z (B, 1): from house time 1 to 0."""
    from scipy.integrate import solve_ivp

    def slope(s: float, x: Any) -> Any:
        state = torch.as_tensor(x, dtype=torch.float64)[:, None]
        return -exact_velocity(state, 1.0 - s, mixture)[:, 0].numpy()

    found = solve_ivp(slope, (0.0, 1.0), z[:, 0].double().numpy(), method="DOP853", rtol=1e-10, atol=1e-11)
    return torch.as_tensor(found.y[:, -1])[:, None]


@lru_cache(maxsize=4)
def pairs(count: int = 20_000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(z, T(z)), each (count, 1) float64. The map is monotone, so it is interpolated from a fine grid."""
    import numpy as np

    grid = torch.linspace(-6.0, 6.0, 4001, dtype=torch.float64)[:, None]
    z = torch.randn(count, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    image = np.interp(z[:, 0].numpy(), grid[:, 0].numpy(), exact_map(grid)[:, 0].numpy())
    return z, torch.as_tensor(image)[:, None]


def quantiles(count: int = 4001) -> Tensor:
    """(count, 1) midpoints of equal shares of N(0, 1): quadrature of expectations over the source."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (2.0**0.5 * torch.erfinv(2.0 * u - 1.0))[:, None]


@dataclass
class Toy:
    """A stand-in for a denoiser in objectives: samples (B, 1, 1, 1), labels ignored (or used by `function`)."""

    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x (B, 1), t (B, 1) float, labels (B,)) -> (B, 1) in the units of `prediction`."""
    path: Path
    prediction: PredictionType = "velocity"
    calls: int = 0
    null_label: int = 0
    preconditioning: Any = None

    def __call__(self, x: Tensor, t: Any, cond: Tensor, compute: Any = None, lands: Any = None) -> Prediction:
        self.calls += 1
        time = torch.as_tensor(t, dtype=torch.float64)
        value = self.function(x.flatten(1), time.expand(len(x))[:, None].to(x.dtype), cond)
        return Prediction(value.reshape(x.shape), self.prediction, x, time, self.path)


class MLP(nn.Module):
    """3 hidden layers of 128, SiLU; input (x, t, class)."""

    def __init__(self, seed: int = 0, width: int = 128, classes: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for before in (2 + classes, width, width):
                layers += [nn.Linear(before, width), nn.SiLU()]
            self.net = nn.Sequential(*layers, nn.Linear(width, 1))
        self.classes = classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        inputs = [x, t]
        if self.classes:
            inputs.append(nn.functional.one_hot(y, self.classes).to(x))
        out: Tensor = self.net(torch.cat(inputs, 1))
        return out


def fit(
    objective: Objective,
    network: MLP,
    data: Callable[[int, Draws], Batch],
    *,
    steps: int,
    path: str = "linear",
    prediction: PredictionType = "velocity",
    batch_size: int = 512,
    lr: float = 1e-3,
) -> Toy:
    """Adam with a cosine, on `data(step, draws)`. Returns the trained toy."""
    toy = Toy(network, get_path(path), prediction)
    optimizer = torch.optim.Adam(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        draws = Draws.single(batch_size, seed=1, step=step)
        loss = objective(toy, data(batch_size, draws), draws).loss  # type: ignore[arg-type]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return toy


def pair_batches(z: Tensor, x0: Tensor) -> Callable[[int, Draws], Batch]:
    """Random rows of stored pairs."""

    def serve(n: int, draws: Draws) -> Batch:
        rows = torch.randint(len(z), (n,), generator=torch.Generator().manual_seed(draws.step))
        shape = (n, 1, 1, 1)
        return Batch(
            x0[rows].float().reshape(shape), torch.zeros(n, dtype=torch.int64), sources=z[rows].float().reshape(shape)
        )

    return serve


def modes_batches(n: int, draws: Draws) -> Batch:
    """Fresh data of the two modes."""
    g = torch.Generator().manual_seed(7_000_000 + draws.step)
    sign = 2.0 * torch.randint(2, (n,), generator=g) - 1.0
    x0 = 1.5 * sign + 0.4 * torch.randn(n, generator=g)
    return Batch(x0.reshape(n, 1, 1, 1), torch.zeros(n, dtype=torch.int64))


def velocity_of(toy: Toy) -> Callable[[Tensor, float], Tensor]:
    """(x (B, 1), t) -> velocity, without gradient: what the diagnostics take."""

    def velocity(x: Tensor, t: float) -> Tensor:
        with torch.no_grad():
            labels = torch.zeros(len(x), dtype=torch.int64)
            return toy(x.float().reshape(-1, 1, 1, 1), t, labels).to("velocity").flatten(1)

    return velocity


def one_step_error(toy: Toy, count: int = 2001) -> float:
    """RMSE of one Euler step against the exact map, over N(0, 1)."""
    z = quantiles(count)
    step = z - velocity_of(toy)(z, 1.0)
    return float((step - exact_map(z)).square().mean().sqrt())

"""How straight a flow is: straightness S, crossing V, transport cost, and the identity between them.

Rectified Flow (arXiv 2209.03003), in house time on the linear path, Z_1 the start (noise), Z_0 where the ODE ends:

    S = int_0^1 E || (Z_1 - Z_0) - v(Z_t, t) ||^2 dt                     0 iff one Euler step is exact
    V = int_0^1 E || (X_1 - X_0) - v(X_t, t) ||^2 dt                     0 iff the pairs never cross
    E|X_1 - X_0|^2 - E|Z_1 - Z_0|^2 = S + V                              for v = E[X_1 - X_0 | X_t]

Squares are summed over the elements of a sample. Networks of other Gaussian paths are read on the linear one. Of them,
what stays constant on a straightened model is its noise prediction: the first-order gap (arXiv 2410.07303).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.paths import Linear
from pliant.plans.noise import batch_noise

if TYPE_CHECKING:
    from pliant.training.data import TrainingSet

Velocity = Callable[[Tensor, float], Tensor]
"""(x (B, ...), house time) -> dx/dt."""


@dataclass(frozen=True)
class Trajectory:
    """States at times 1 = t_0 > ... > t_N = 0 and the velocities there."""

    times: tuple[float, ...]
    states: tuple[Tensor, ...]
    velocities: tuple[Tensor, ...]

    @property
    def displacement(self) -> Tensor:
        """Z_1 - Z_0."""
        return self.states[0] - self.states[-1]


@torch.no_grad()
def trajectory(velocity: Velocity, start: Tensor, steps: int, last: float = 0.0) -> Trajectory:
    """Heun's method from t = 1 on `steps` equal intervals; two calls each. last: where the final velocity is read."""
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).tolist()
    states, velocities = [start], []
    x, v = start, velocity(start, times[0])
    for t, s in pairwise(times):
        velocities.append(v)
        ahead = velocity(x + (s - t) * v, max(s, last))
        x = x + 0.5 * (s - t) * (v + ahead)
        v = velocity(x, max(s, last))
        states.append(x)
    return Trajectory(tuple(times), tuple(states), (*velocities, v))


def straightness_of(path: Trajectory) -> Tensor:
    """S of each time interval, by the trapezoidal rule, (N,): their sum is S. Means over the batch."""
    errors = torch.stack([_square(path.displacement - v) for v in path.velocities])
    widths = -torch.diff(torch.tensor(path.times, dtype=errors.dtype, device=errors.device))
    return widths * 0.5 * (errors[:-1] + errors[1:])


def transport_cost(path: Trajectory) -> float:
    """E|Z_1 - Z_0|^2."""
    return float(_square(path.displacement))


def curvature(path: Trajectory) -> Tensor:
    """(N,): mean over the batch of |v_{k+1} - v_k| / (|dt| |Z_1 - Z_0|), how fast the direction turns in each step."""
    turns = torch.stack([(b - a).flatten(1).norm(dim=1) for a, b in pairwise(path.velocities)])
    widths = -torch.diff(torch.tensor(path.times, dtype=turns.dtype, device=turns.device))
    return (turns / path.displacement.flatten(1).norm(dim=1).clamp(min=1e-12)).mean(1) / widths


@torch.no_grad()
def crossing(velocity: Velocity, x0: Tensor, x1: Tensor, nodes: int = 64) -> float:
    """V of the pairs (x0, x1), midpoint rule over `nodes` times. With a trained velocity its error is included."""
    total = 0.0
    for k in range(nodes):
        t = (k + 0.5) / nodes
        total += float(_square(x1 - x0 - velocity((1.0 - t) * x0 + t * x1, t))) / nodes
    return total


def _square(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(1).mean()


@dataclass(frozen=True)
class Straightness:
    """Measured on `count` trajectories of a model, squares summed over the elements of a sample."""

    straightness: float
    relative: float
    """S over the transport cost: 0 for straight, 1 for velocities that say nothing about the displacement."""
    cost: float
    """Of the flow, E|Z_1 - Z_0|^2."""
    first_order_gap: float
    """Mean square over elements of (noise prediction along the trajectory - starting noise)."""
    per_step: tuple[float, ...]
    """S of each interval, from noise to data."""
    curvature: tuple[float, ...]
    steps: int
    count: int
    crossing: float | None = None
    """V of data with independent noise; None without data."""
    independent_cost: float | None = None
    """E|X_1 - X_0|^2 of these."""

    @property
    def residual(self) -> float | None:
        """`(independent cost - cost - S - V) / independent cost`: 0 for an exact velocity and exact ODE."""
        if self.crossing is None or self.independent_cost is None:
            return None
        return (self.independent_cost - self.cost - self.straightness - self.crossing) / self.independent_cost

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "residual": self.residual}


def straightness(
    model: Denoiser,
    *,
    steps: int = 50,
    count: int = 256,
    compute: Compute | None = None,
    data: TrainingSet | None = None,
    first_seed: int = 0,
    batch_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> Straightness:
    """Measure a model on seeded noise, classes in turn; with `data`, crossing and the identity too.

    Raises ConfigError for a path that cannot be read as the linear one.
    """
    if steps < 1 or count < 1:
        raise ConfigError(f"straightness needs steps >= 1 and count >= 1, got {steps} and {count}")
    plain = isinstance(model.path, Linear) and model.prediction == "velocity"
    linear = model if plain else model.on_path(Linear(), "velocity")
    low = 1e-3 if linear.trained is not None else 0.0  # other networks may not speak at t = 0
    parts = []
    for begin in range(0, count, batch_size):
        seeds = list(range(first_seed + begin, first_seed + min(count, begin + batch_size)))
        labels = torch.tensor([s % model.num_classes for s in seeds], device=model.device)
        noise = batch_noise(seeds, -1, model.sample_shape, model.device)
        parts.append((len(seeds), _one(linear, noise, labels, compute, steps, low)))
        if progress is not None:
            progress(begin + len(seeds), count)

    def mean(read: Callable[[Any], Any]) -> Any:
        return sum(n * read(part) for n, part in parts) / count

    per_step = mean(lambda p: p[0])
    cost = float(mean(lambda p: p[1]))
    total = float(per_step.sum())
    found = {} if data is None else _against(linear, data, compute, count, first_seed)
    return Straightness(
        total, total / cost, cost, float(mean(lambda p: p[2])), tuple(per_step.tolist()),
        tuple(mean(lambda p: p[3]).tolist()), steps, count, **found,
    )  # fmt: skip


def _velocity(model: Denoiser, labels: Tensor, compute: Compute | None) -> Velocity:
    def velocity(x: Tensor, t: float) -> Tensor:
        with torch.no_grad():
            return model(x, t, labels, compute).to("velocity").float()

    return velocity


def _one(
    model: Denoiser, noise: Tensor, labels: Tensor, compute: Compute | None, steps: int, low: float
) -> tuple[Any, ...]:
    path = trajectory(_velocity(model, labels, compute), noise, steps, low)
    # On the linear path eps = x + (1-t) v.
    gaps = [
        (x + (1.0 - t) * v - noise).square().mean()
        for t, x, v in zip(path.times, path.states, path.velocities, strict=True)
    ]
    return straightness_of(path), transport_cost(path), torch.stack(gaps).mean(), curvature(path)


def _against(
    model: Denoiser, data: TrainingSet, compute: Compute | None, count: int, first_seed: int
) -> dict[str, float]:
    from pliant.training.draws import Draws

    indices = torch.arange(count) % len(data.labels)
    x0 = data.samples(indices, torch.zeros(count, dtype=torch.bool), Draws.single(count)).to(model.device)
    labels = data.labels[indices].to(model.device)
    x1 = batch_noise(list(range(first_seed, first_seed + count)), -1, model.sample_shape, model.device)
    v = crossing(_velocity(model, labels, compute), x0, x1, 32)
    return {"crossing": v, "independent_cost": float(_square(x1 - x0))}

"""alpha-Flow (arXiv 2510.20771): mean velocities by a short step and the map's own jump from there, without
derivatives.

The target of a jump t -> r is made of a step t -> m along the velocity and the map's jump m -> r, where m divides the
jump by alpha: `alpha v + (1 - alpha) sg[u(x_m, m, r)]`. alpha = 1 is flow matching on the chord's velocity, alpha ->
0 has MeanFlow's gradient; training goes from one towards the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pliant.errors import ConfigError
from pliant.paths import like
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss
from pliant.training.objectives.jump_times import jump_times
from pliant.training.objectives.mean_flow import MeanVelocity, adaptive, squared_norm

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class Curriculum:
    """alpha over training: a sigmoid from 1 down to `least` between two steps, `least` from there on."""

    first: int = 0
    last: int = 1000
    least: float = 0.05
    steepness: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last or not 0.0 < self.least <= 1.0:
            raise ConfigError("alpha goes down between two steps (first < last) to a least above 0 and at most 1")

    def __call__(self, step: int) -> float:
        """alpha at a training step, in [least, 1]."""
        if step <= self.first:
            return 1.0
        if step >= self.last:
            return self.least
        place = (step - self.first) / (self.last - self.first)
        return max(self.least, 1.0 / (1.0 + math.exp(self.steepness * (place - 0.5))))


@dataclass(frozen=True)
class AlphaFlow(MeanVelocity):
    """`1/alpha || u(x_t, t, r) - sg[alpha v + (1 - alpha) u(x_m, m, r)] ||^2`, each sample's divided by its size."""

    alpha: Curriculum = field(default_factory=Curriculum)

    name = "alpha-flow"
    passes = 4.0

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        t, r = jump_times(self.time, self.still, draws)
        alpha = self.alpha(draws.step)
        x, labels, v = self.begin(denoiser, batch, draws, t)
        target = v
        if alpha < 1.0:
            middle = alpha * r + (1.0 - alpha) * t
            with torch.no_grad():
                rest = denoiser(x - like(t - middle, x) * v, middle, labels, lands=r).to("velocity")
            target = alpha * v + (1.0 - alpha) * rest
        error = squared_norm(denoiser(x, t, labels, lands=r).to("velocity") - target) / alpha
        return Loss(adaptive(error, self.power).mean(), {"error": error.detach().mean() / x[0].numel()})

"""Improved MeanFlow (arXiv 2512.02012): regress `V = u + (t - s) sg[du/dt]` on the data's velocity.

MeanFlow's target contains its own network; here the target is the data's, and the tangent is the network's own
velocity, so V is a function of the state alone and this is an ordinary regression.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pliant.paths import like
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss
from pliant.training.objectives.jump_times import jump_times
from pliant.training.objectives.mean_flow import Derived, adaptive, squared_norm

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class ImprovedMeanFlow(Derived):
    """Both terms of the paper, with one head: the velocity is the map's own answer for a step that lands where it is.

    (The paper's network has a second head for velocities, and is told the guidance scale and interval; here guidance
    is one number, learned into the map.)
    """

    name = "improved-mean-flow"
    passes = 7.0

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        t, s = jump_times(self.time, self.still, draws)
        x, labels, target = self.begin(denoiser, batch, draws, t)
        v = denoiser(x, t, labels, lands=t).to("velocity")
        u, du = self.derivative(denoiser, x, t, labels, v.detach(), s)
        error = squared_norm(u + like(t - s, x) * du - target)
        velocity_error = squared_norm(v - target)
        loss = adaptive(error, self.power).mean() + adaptive(velocity_error, self.power).mean()
        return Loss(loss, {"error": error.detach().mean() / x[0].numel()})

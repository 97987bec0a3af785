"""Improved MeanFlow (arXiv 2512.02012): regress `V = u + (t - s) sg[du/dt]` on the data's velocity.

MeanFlow's target contains its own network; here the target is the data's, and the tangent is the network's own
velocity, so V is a function of the state alone and this is an ordinary regression.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pliant.paths import TimeDensity, like
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss, drop_labels
from pliant.training.objectives.jump_times import jump_times
from pliant.training.objectives.jvp import velocity_and_derivative
from pliant.training.objectives.mean_flow import (
    adaptive,
    check_flow_map,
    learned_velocity,
    logit_normal,
    squared_norm,
    velocity_flops,
)

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class ImprovedMeanFlow:
    """Both terms of the paper, with one head: the velocity is the map's own answer for a step that lands where it is.

    (The paper's network has a second head for velocities, and is told the guidance scale and interval; here guidance
    is one number, learned into the map.)
    """

    teacher: Denoiser | None = None
    guidance: float = 1.0
    mixing: float = 0.0
    time: TimeDensity = field(default_factory=logit_normal)
    still: float = 0.5
    power: float = 1.0
    class_dropout: float = 0.1

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        t, s = jump_times(self.time, self.still, draws)
        noise = draws.noise(denoiser.path, batch.images.shape[1:])
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        x = denoiser.path.mix(batch.images, noise, t)
        target = learned_velocity(denoiser, self.teacher, self.guidance, self.mixing, batch, noise, x, t, labels)
        v = denoiser(x, t, labels, lands=t).to("velocity")
        u, du = velocity_and_derivative(denoiser, x, t, labels, v.detach(), lands=s)
        error = squared_norm(u + like(t - s, x) * du - target)
        velocity_error = squared_norm(v - target)
        loss = adaptive(error, self.power).mean() + adaptive(velocity_error, self.power).mean()
        return Loss(loss, {"error": error.detach().mean() / x[0].numel()})

    def check(self, denoiser: Denoiser) -> None:
        check_flow_map(denoiser, "improved-mean-flow")

    def flops(self, denoiser: Denoiser) -> float:
        return 7.0 * denoiser.flops() + velocity_flops(denoiser, self.teacher, self.guidance, self.mixing)

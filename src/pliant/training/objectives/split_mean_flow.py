"""SplitMeanFlow (arXiv 2507.16884): a jump is two jumps, `(t-r) u(t,r) = (t-s) u(t,s) + (s-r) u(s,r)`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pliant.paths import TimeDensity, like
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss, drop_labels
from pliant.training.objectives.jump_times import jump_times
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
class SplitMeanFlow:
    """Both halves of a jump, split at a random place, are the target of the whole; rows that land where they are learn
    the velocity itself. No derivatives: for networks or devices without forward-mode differentiation."""

    teacher: Denoiser | None = None
    guidance: float = 1.0
    mixing: float = 0.0
    time: TimeDensity = field(default_factory=logit_normal)
    still: float = 0.5
    power: float = 1.0
    class_dropout: float = 0.1

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        t, r = jump_times(self.time, self.still, draws)
        share = draws.uniform().double()  # lambda, in [0, 1)
        noise = draws.noise(denoiser.path, batch.images.shape[1:])
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        x = denoiser.path.mix(batch.images, noise, t)
        v = learned_velocity(denoiser, self.teacher, self.guidance, self.mixing, batch, noise, x, t, labels)
        s = (1.0 - share) * t + share * r
        with torch.no_grad():
            first = denoiser(x, t, labels, lands=s).to("velocity")
            second = denoiser(x - like(t - s, x) * first, s, labels, lands=r).to("velocity")
        # (t - s)/(t - r) is lambda, also in the limit of jumps of no length, which learn v instead.
        both = like(share, x) * first + like(1.0 - share, x) * second
        target = torch.where((t == r)[:, None, None, None], v, both)
        error = squared_norm(denoiser(x, t, labels, lands=r).to("velocity") - target)
        return Loss(adaptive(error, self.power).mean(), {"error": error.detach().mean() / x[0].numel()})

    def check(self, denoiser: Denoiser) -> None:
        check_flow_map(denoiser, "split-mean-flow")

    def flops(self, denoiser: Denoiser) -> float:
        return 5.0 * denoiser.flops() + velocity_flops(denoiser, self.teacher, self.guidance, self.mixing)

"""SplitMeanFlow (arXiv 2507.16884): a jump is two jumps, `(t-r) u(t,r) = (t-s) u(t,s) + (s-r) u(s,r)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pliant.paths import like
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss
from pliant.training.objectives.jump_times import jump_times
from pliant.training.objectives.mean_flow import MeanVelocity, adaptive, squared_norm

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class SplitMeanFlow(MeanVelocity):
    """Both halves of a jump, split at a random place, are the target of the whole; rows that land where they are learn
    the velocity itself. No derivatives: for networks or devices without forward-mode differentiation.

    The paper takes the halves from the current weights. Here the running average takes them, at the model's own patch
    size: a student that changes its patch size and learns from itself diverged, since nothing holds what two of its
    jumps add up to. Without an average (outside a training run) the halves are the current weights' own.
    """

    average: Denoiser | None = None

    name = "split-mean-flow"
    passes = 5.0

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        t, r = jump_times(self.time, self.still, draws)
        share = draws.uniform().double()  # lambda, in [0, 1)
        x, labels, v = self.begin(denoiser, batch, draws, t)
        s = (1.0 - share) * t + share * r
        model = self.average or denoiser
        with torch.no_grad():
            first = model(x, t, labels, lands=s).to("velocity")
            second = model(x - like(t - s, x) * first, s, labels, lands=r).to("velocity")
        # (t - s)/(t - r) is lambda, also in the limit of jumps of no length, which learn v instead.
        both = like(share, x) * first + like(1.0 - share, x) * second
        target = torch.where((t == r)[:, None, None, None], v, both)
        error = squared_norm(denoiser(x, t, labels, lands=r).to("velocity") - target)
        return Loss(adaptive(error, self.power).mean(), {"error": error.detach().mean() / x[0].numel()})

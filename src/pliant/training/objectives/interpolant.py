"""Stochastic interpolants between two data sets (arXiv 2303.08797): heads for the velocity, the score or the noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pliant.errors import ConfigError
from pliant.paths import Interpolant, TimeDensity, get_time_density, like
from pliant.paths.interpolants import quadratic_loss
from pliant.training.couplings import stored_sources
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss, drop_labels

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser

HEADS = ("velocity", "score", "epsilon")


def _inner() -> TimeDensity:
    return get_time_density("uniform", low=1e-3, high=1.0 - 1e-3)


@dataclass(frozen=True)
class InterpolantMatching:
    """`|P|^2/2 - target.P` with the network's own kind of prediction, mean over elements; lower is better, below 0.

    velocity: target a'x0 + b'x1 + c'z; score: -z/c; epsilon: z (the paper's denoiser). Velocity and score targets
    diverge where c or c' do, near the ends: samples with min(t, 1-t) below `antithetic` are also shown with -z, which
    cancels that to first order. 0.5 does so everywhere, 0 nowhere.
    """

    time: TimeDensity = field(default_factory=_inner)
    antithetic: float = 0.1
    class_dropout: float = 0.0

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        t = draws.each(self.time.sample)
        x1, z = stored_sources(batch), draws.normal(batch.images.shape[1:])
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        twins = torch.minimum(t, 1.0 - t) < self.antithetic
        if denoiser.prediction == "epsilon":  # its target is bounded
            twins = torch.zeros_like(twins)
        rows = torch.cat([torch.arange(len(t), device=t.device), twins.nonzero()[:, 0]])
        signed = torch.cat([z, -z[twins]])
        path, x0, x1, t = denoiser.path, batch.images[rows], x1[rows], t[rows]
        prediction = denoiser(path.interpolate(x0, x1, signed, t), t, labels[rows])
        losses = quadratic_loss(prediction.value.float(), interpolant_target(denoiser, x0, x1, signed, t))
        weight = torch.where(twins, 0.5, 1.0).to(losses)[rows]  # a sample and its twin count as one
        return Loss((weight * losses).sum() / batch.images.numel())

    def check(self, denoiser: Denoiser) -> None:
        if not isinstance(denoiser.path, Interpolant):
            raise ConfigError(f"objective 'interpolant' trains interpolants, not path {denoiser.path.name!r}")
        if denoiser.prediction not in HEADS:
            raise ConfigError(f"an interpolant's network predicts {', '.join(HEADS)}, not {denoiser.prediction!r}")
        if not 0.0 <= self.antithetic <= 0.5:
            raise ConfigError(f"antithetic is a distance from the ends, 0 to 0.5; got {self.antithetic}")

    def flops(self, denoiser: Denoiser) -> float:
        twins = 0.0 if denoiser.prediction == "epsilon" else 2.0 * self.antithetic
        return 3.0 * denoiser.flops() * (1.0 + twins)


def interpolant_target(denoiser: Denoiser, x0: Tensor, x1: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """What the network's kind of prediction should be for known ends and noise, (B, C, H, W)."""
    s = denoiser.path.coefficients(t)
    if denoiser.prediction == "velocity":
        return like(s.da, x0) * x0 + like(s.db, x0) * x1 + like(s.dc, x0) * z
    return -z / like(s.c, z) if denoiser.prediction == "score" else z

"""Training FlowTurbo's velocity refiner (arXiv 2409.18128): a small network that updates an old velocity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pliant.errors import ConfigError
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss, drop_labels

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class VelocityRefiner:
    """`|| v(x_t, t) + r([x', v], t') - v(x', t') ||^2`, x' one Euler step of length dt ~ U(0, longest) from x_t.

    dt is one number per batch. Labels are dropped for the refiner and the target alike, as in the paper.
    """

    teacher: Denoiser
    longest: float = 0.12
    class_dropout: float = 0.1

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        teacher, path = self.teacher, self.teacher.path
        dt = self.longest * float(torch.rand(1, generator=draws.shared(), dtype=torch.float64))
        t = dt + (1.0 - dt) * draws.uniform().double()
        labels = drop_labels(batch, teacher, self.class_dropout, draws)
        x = path.mix(batch.images, draws.noise(path, batch.images.shape[1:]), t)
        with torch.no_grad():
            old = teacher(x, t, labels).to("velocity")
            later = x - dt * old
            target = teacher(later, t - dt, labels).to("velocity")
        offset = denoiser(torch.cat([later, old], dim=1), t - dt, labels).to("velocity")[:, : x.shape[1]]
        before = (old - target).square().mean()
        loss = (old + offset - target).square().mean()
        return Loss(loss, {"unrefined": before})

    def check(self, denoiser: Denoiser) -> None:
        if self.teacher.path.name != "linear" or self.teacher.prediction != "velocity":
            raise ConfigError("a velocity refiner goes with a rectified flow: velocity on the linear path")
        wanted = 2 * self.teacher.config.in_channels
        if denoiser.config.in_channels != wanted:
            raise ConfigError(f"a refiner sees states and velocities: give its network in_channels {wanted}")
        if not 0.0 < self.longest < 1.0:
            raise ConfigError(f"a refiner's longest step lies between 0 and 1, got {self.longest}")

    def flops(self, denoiser: Denoiser) -> float:
        return 3.0 * denoiser.flops() + 2.0 * self.teacher.flops()

"""Consistency distillation (arXiv 2303.01469), the last stage of Rectified Diffusion (2410.07303)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pliant.errors import ConfigError
from pliant.training.couplings import Coupling, Independent
from pliant.training.draws import Draws
from pliant.training.losses import Compared, ElementHuber, Metric
from pliant.training.objectives.base import Batch, Loss, drop_labels
from pliant.training.objectives.jumps import ddim_step, guided

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class Consistency:
    """The clean data said at t_n equals what the averaged weights say one teacher step (DDIM) later, at t_{n-1}.

    times: ascending, from 0 (where the state is its own clean data, on paths without noise there) to the most noisy.
    """

    teacher: Denoiser
    times: tuple[float, ...]
    guidance: float = 1.0
    metric: Metric = field(default_factory=ElementHuber)
    class_dropout: float = 0.0
    coupling: Coupling = field(default_factory=Independent)
    average: Denoiser | None = None
    """The running average of the student, filled in by the trainer."""

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        path = denoiser.path
        grid = torch.tensor(self.times, dtype=torch.float64, device=draws.device)
        n = 1 + draws.integers(len(grid) - 1)
        t, s = grid[n], grid[n - 1]
        ends = self.coupling(batch, path, draws)
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        x = path.mix(ends.x0, ends.x1, t)
        with torch.no_grad():
            earlier = ddim_step(guided(self.teacher, x, t, labels, self.guidance), s)
            target = (self.average or denoiser)(earlier, s, labels).to("sample")
        prediction = denoiser(x, t, labels).to("sample")
        return Loss(self.metric(Compared(prediction, target, t, lambda: prediction, target)).mean())

    def check(self, denoiser: Denoiser) -> None:
        if len(self.times) < 2 or list(self.times) != sorted(set(self.times)):
            raise ConfigError("consistency distillation takes at least 2 ascending times")
        if self.teacher.path != denoiser.path:
            raise ConfigError("consistency distillation keeps the teacher's path, but the student has another one")

    def flops(self, denoiser: Denoiser) -> float:
        calls = 1.0 if self.guidance == 1.0 else 2.0
        return 4.0 * denoiser.flops() + calls * self.teacher.flops()

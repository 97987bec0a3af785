"""Phased rectification (Rectified Diffusion, arXiv 2410.07303): one straight piece per phase of the time axis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pliant.compute import Compute
from pliant.errors import ConfigError
from pliant.paths import Path
from pliant.training.couplings import Ends
from pliant.training.draws import Draws
from pliant.training.losses import Compared, ElementHuber, Metric
from pliant.training.models import Runner
from pliant.training.objectives.base import Batch, Loss, drop_labels

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class Phased:
    """Real data is noised to the start of a phase, the teacher solves the phase, and the student learns to cross it in
    one DDIM step from anywhere on the chord. A regression: no target network, no pairs.

    phases: the teacher's plan of every phase, in any order; the ends of their times are the boundaries.
    """

    phases: tuple[Runner, ...]
    metric: Metric = field(default_factory=ElementHuber)
    class_dropout: float = 0.0

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        path = denoiser.path
        phase = self.phases[int(torch.randint(len(self.phases), (1,), generator=draws.shared()))]
        start, end = phase.plan.times[0], phase.plan.times[-1]
        x = path.mix(batch.images, draws.noise(path, batch.images.shape[1:]), start)
        arrived = phase(batch.labels, x)
        ends = chord_ends(path, x, start, arrived, end)
        t = start - (start - end) * draws.uniform().double()  # in (end, start]
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        prediction = denoiser(path.mix(ends.x0, ends.x1, t), t, labels, Compute())
        crossed = path.mix(prediction.to("sample"), prediction.to("epsilon"), end)
        return Loss(self.metric(Compared(crossed, arrived, t, lambda: prediction.to("sample"), ends.x0)).mean())

    def check(self, denoiser: Denoiser) -> None:
        if any(phase.teacher.path != denoiser.path for phase in self.phases):
            raise ConfigError("phased rectification keeps the teacher's path, but the student has another one")

    def flops(self, denoiser: Denoiser) -> float:
        solving = sum(phase.plan.cost(phase.teacher).flops for phase in self.phases) / len(self.phases)
        return 3.0 * denoiser.flops() + solving


def chord_ends(path: Path, x: Tensor, t: float, y: Tensor, s: float) -> Ends:
    """The (x0, eps) that one DDIM step from (x, t) to (y, s) assumes: both states are `alpha x0 + sigma eps` of it.

    The same as eps = (y/alpha_s - x/alpha_t)/(n_s - n_t) with n = sigma/alpha, finite also where alpha is 0.
    """
    a, b = path.alpha_sigma(t), path.alpha_sigma(s)
    det = float(a.alpha * b.sigma - a.sigma * b.alpha)
    x0 = (float(b.sigma) * x - float(a.sigma) * y) / det
    eps = (float(a.alpha) * y - float(b.alpha) * x) / det
    return Ends(x0, eps)


def phase_entries(entries: int, steps: int, per_phase: int) -> list[int]:
    """Discrete times at which phases begin, ascending: a DDIM grid of `steps` over a table of `entries`, cut every
    `per_phase` steps. 1000 entries, 40 steps, 10 a phase: 249, 499, 749, 999.
    """
    if entries % steps or steps % per_phase:
        raise ConfigError(f"{entries} entries do not divide into {steps} steps, or these into phases of {per_phase}")
    stride = entries // steps * per_phase
    return list(range(stride - 1, entries, stride))

"""Recipe L of FlexiDiT (arXiv 2502.20126; sheet A, 1.6): new patch sizes imitate the original one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pliant.compute import Compute
from pliant.errors import ConfigError
from pliant.paths import TimeDensity, VPDiscrete
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss, drop_labels
from pliant.training.objectives.flow_matching import _uniform
from pliant.training.objectives.shared import Patch, choose, model_patches

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class PatchDistillation:
    """`E || f(x_t, t, c; p0) - f(x_t, t, c; p_new) ||^2` in the network's own prediction type.

    The original size p0 gets no gradient. With variance channels, their code is regressed too with
    `variance_weight` (decision 7.4; 0 switches it off). Labels are dropped as in training, so that the
    unconditional branch is learnt as well.
    """

    time: TimeDensity | None = None
    """None: uniform, over the table's entries when the path is a table."""
    class_dropout: float = 0.1
    variance_weight: float = 0.1

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        new = _new_patches(denoiser)
        patch = choose(new, draws)
        t = self._times(denoiser, draws)
        noise = draws.noise(denoiser.path, batch.images.shape[1:])
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        x = denoiser.path.mix(batch.images, noise, t)
        with torch.no_grad():
            teacher = denoiser(x, t, labels, Compute())
        student = denoiser(x, t, labels, Compute(patch=patch, merged=False))
        gap = (student.value.float() - teacher.value.float()).square().mean()
        if student.variance is None or teacher.variance is None or self.variance_weight == 0:
            return Loss(gap)
        codes = (student.variance.float() - teacher.variance.float()).square().mean()
        return Loss(gap + self.variance_weight * codes, {"gap": gap.detach(), "variance_gap": codes.detach()})

    def _times(self, denoiser: Denoiser, draws: Draws) -> Tensor:
        path = denoiser.path
        if self.time is None and isinstance(path, VPDiscrete):
            return path.time_of_timestep(draws.integers(path.num_timesteps))
        return draws.each((self.time or _uniform()).sample)

    def check(self, denoiser: Denoiser) -> None:
        _new_patches(denoiser)
        if not any(parameter.requires_grad for parameter in denoiser.network.parameters()):
            raise ConfigError("distillation has nothing to train: every parameter of the model is frozen")

    def flops(self, denoiser: Denoiser) -> float:
        new = _new_patches(denoiser)
        student = sum(denoiser.flops(Compute(patch=patch, merged=False)) for patch in new) / len(new)
        return denoiser.flops(Compute()) + 3.0 * student


def _new_patches(denoiser: Denoiser) -> list[Patch]:
    """All patch sizes but the model's own."""
    return model_patches(denoiser)[1:]

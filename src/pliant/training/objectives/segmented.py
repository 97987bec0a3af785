"""Trajectory-segmented consistency distillation (TSCD of Hyper-SD, arXiv 2404.13686): CTM inside segments of time.

With many segments jumps are short and easy; stages with 8, 4, 2 and 1 segments train on from each other, and a model
of k segments samples in k steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pliant.errors import ConfigError
from pliant.training.draws import Draws
from pliant.training.losses import Compared, Metric, SquaredError
from pliant.training.objectives.base import Batch, Loss, drop_labels
from pliant.training.objectives.jumps import heun_step, jump
from pliant.training.objectives.trajectory import check_jumps

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


def segment_start(t: Tensor, segments: int) -> Tensor:
    """The clean end t_b of the segment that times t in (0, 1] belong to; a boundary belongs to the segment below it."""
    return (torch.ceil(t * segments - 1e-9) - 1.0).clamp(min=0.0) / segments


@dataclass(frozen=True)
class SegmentedConsistency:
    """`d(jump(x_n, t_n -> end), jump_avg(teacher step of x_n, t_{n-1} -> end))`, end uniform in [t_b, t_{n-1}].

    The grid has `steps` equal parts of [0, 1], a multiple of `segments`; the teacher takes one Heun step of it.
    """

    teacher: Denoiser
    segments: int
    steps: int = 32
    guidance: float = 1.0
    metric: Metric = field(default_factory=SquaredError)
    class_dropout: float = 0.0
    average: Denoiser | None = None

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        path = denoiser.path
        n = 1 + draws.integers(self.steps)
        t, before = n.double() / self.steps, (n - 1).double() / self.steps
        low = segment_start(t, self.segments)
        end = low + (before - low) * draws.uniform().double()
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        x = path.mix(batch.images, draws.noise(path, batch.images.shape[1:]), t)
        with torch.no_grad():
            earlier = heun_step(self.teacher, x, t, before, labels, self.guidance)
            target = jump(self.average or denoiser, earlier, before, end, labels)
        landed = jump(denoiser, x, t, end, labels)
        return Loss(self.metric(Compared(landed, target, t, lambda: landed, target)).mean())

    def check(self, denoiser: Denoiser) -> None:
        if self.segments < 1 or self.steps % self.segments:
            raise ConfigError(f"{self.steps} teacher steps do not divide into {self.segments} segments")
        check_jumps(denoiser, self.teacher, (1.0, 0.0), "tscd")

    def flops(self, denoiser: Denoiser) -> float:
        return 4.0 * denoiser.flops() + 2.0 * (1.0 if self.guidance == 1.0 else 2.0) * self.teacher.flops()

"""SlimFlow's flow-guided distillation (arXiv 2407.12718): stored pairs, and a two-step target made on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pliant.compute import Compute
from pliant.errors import ConfigError
from pliant.paths import Linear, like
from pliant.training.couplings import Stored
from pliant.training.draws import Draws
from pliant.training.losses import Compared, Metric, SquaredError
from pliant.training.objectives.base import Batch, Loss, drop_labels
from pliant.training.objectives.flow_matching import regression

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class FlowGuided:
    """One-step distillation of a straight teacher into a (smaller) student; linear path.

    `D(z - v(z, 1), x_hat)` on stored pairs, plus for fresh noise z the student's own step to a random time, finished by
    one step of the teacher: `D(z - v(z, 1), two-step result)`. No gradient goes through the target.
    """

    teacher: Denoiser
    metric: Metric = field(default_factory=SquaredError)
    low: float = 0.2
    high: float = 0.8
    """Share of the way after which the teacher takes over, uniform between the two."""
    weight: float = 1.0
    """Of the two-step term."""
    class_dropout: float = 0.0

    needs_partners = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.high < 1.0:
            raise ConfigError(f"the teacher takes over between 0 <= low <= high < 1, got {self.low} and {self.high}")

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        one = torch.ones(len(batch), dtype=torch.float64, device=draws.device)
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        ends = Stored()(batch, denoiser.path, draws)
        stored = regression(denoiser, ends, one, labels, self.metric).mean()
        noise = draws.noise(denoiser.path, batch.images.shape[1:])
        share = self.low + (self.high - self.low) * draws.uniform().double()
        velocity = denoiser(noise, 1.0, labels, Compute()).to("velocity")
        target = two_step_target(self.teacher, noise, velocity.detach(), share, labels)
        guided = self.metric(Compared(velocity, noise - target, one, lambda: noise - velocity, target)).mean()
        return Loss(stored + self.weight * guided, {"pairs": stored.detach(), "two_step": guided.detach()})

    def check(self, denoiser: Denoiser) -> None:
        for model, what in ((denoiser, "student"), (self.teacher, "teacher")):
            if not isinstance(model.path, Linear):
                raise ConfigError(f"flow-guided distillation takes linear paths; the {what}'s is {model.path.name!r}")

    def flops(self, denoiser: Denoiser) -> float:
        return 6.0 * denoiser.flops() + self.teacher.flops()


@torch.no_grad()
def two_step_target(teacher: Denoiser, noise: Tensor, velocity: Tensor, share: Tensor, labels: Tensor) -> Tensor:
    """Where `noise` (B, C, H, W) ends: `share` (B,) of the way at `velocity`, the rest in one step of the teacher."""
    way = like(share, noise)
    middle = noise - way * velocity
    rest = teacher(middle, 1.0 - share, labels).to("velocity")
    return middle - (1.0 - way) * rest

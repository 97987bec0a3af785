"""Direct distillation along the student's own steps: what it meets when it samples is what it is trained on.

States of a pair's chord contain the exact sample, so a second step that is trained on them copies what the first
one predicted, errors included. Here the state of a later step is where the student's earlier steps lead, from the
pair's noise (DMD2's backward simulation, arXiv 2405.14867, 4.5, with pairs), and the target is the sample still: later
steps learn to correct earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from pliant.compute import Compute
from pliant.errors import ConfigError
from pliant.paths import PredictionType
from pliant.training.couplings import Coupling, Stored
from pliant.training.draws import Draws
from pliant.training.losses import Compared, Metric, SquaredError
from pliant.training.objectives.base import Batch, Loss, drop_labels
from pliant.training.objectives.jumps import ddim_step

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class RolloutDistillation:
    """Mean over the steps (t, compute) of a plan of `metric(f(x_t, t; compute), x0)`, in `space`.

    The plan starts at t = 1; between steps the state moves as DDIM does (on the linear path, as Euler) and carries no
    gradient. Every batch goes through all steps: with k steps, k times the cost of `StepDistillation`'s one.
    """

    steps: tuple[tuple[float, Compute], ...]
    metric: Metric = field(default_factory=SquaredError)
    space: PredictionType = "velocity"
    class_dropout: float = 0.0
    coupling: Coupling = field(default_factory=Stored)

    needs_partners = False

    def __post_init__(self) -> None:
        times = [t for t, _ in self.steps]
        if not times or times[0] != 1.0 or any(t <= s for t, s in pairwise(times)) or times[-1] <= 0.0:
            raise ConfigError(f"a rollout needs steps at descending times from 1, all above 0, not at {times}")

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        path = denoiser.path
        ends = self.coupling(batch, path, draws)
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        times = [torch.full((len(batch),), t, dtype=torch.float64, device=draws.device) for t, _ in self.steps]
        x = path.mix(ends.x0, ends.x1, times[0])
        losses = []
        for k, (t, (_, compute)) in enumerate(zip(times, self.steps, strict=True)):
            prediction = denoiser(x, t, labels, compute)
            target = path.convert(ends.x0, x, t, "sample", self.space)
            compared = Compared(prediction.to(self.space), target, t, partial(prediction.to, "sample"), ends.x0)
            losses.append(self.metric(compared).mean())
            if k + 1 < len(times):
                with torch.no_grad():
                    x = ddim_step(prediction, times[k + 1]).to(x.dtype)
        logs = {f"loss_step_{k + 1}": loss.detach() for k, loss in enumerate(losses)}
        return Loss(torch.stack(losses).mean(), logs)

    def check(self, denoiser: Denoiser) -> None:
        for _, compute in self.steps:
            denoiser.patch_of(compute)

    def flops(self, denoiser: Denoiser) -> float:
        return 3.0 * sum(denoiser.flops(compute) for _, compute in self.steps)

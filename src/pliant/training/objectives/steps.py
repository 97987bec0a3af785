"""Direct distillation: at the times at which a few-step plan calls the network, regress the pair's displacement.

Rectified Flow (arXiv 2209.03003, section 2.2 and its code), InstaFlow (2309.06380). One step: the state is the noise
itself and the target the teacher's sample. Several steps: states on the pair's chord; the target stays the full
displacement. A step may have a compute of its own: a weak first step is trained as a weak step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pliant.compute import Compute
from pliant.errors import ConfigError
from pliant.paths import PredictionType
from pliant.training.couplings import Coupling, Stored
from pliant.training.draws import Draws
from pliant.training.losses import Metric, SquaredError
from pliant.training.objectives.base import Batch, Loss, drop_labels
from pliant.training.objectives.flow_matching import regression

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class StepDistillation:
    """`E metric(f(x_t, t; compute of t), x0 -> x1)` over the steps (t, compute) of a plan.

    Steps of one compute share batches; which compute a batch is for is drawn, in proportion to its steps.
    """

    steps: tuple[tuple[float, Compute], ...]
    metric: Metric = field(default_factory=SquaredError)
    space: PredictionType = "velocity"
    class_dropout: float = 0.0
    coupling: Coupling = field(default_factory=Stored)

    needs_partners = False

    def __post_init__(self) -> None:
        if not self.steps:
            raise ConfigError("distillation to a few steps needs at least one step")

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        compute = self.steps[int(torch.randint(len(self.steps), (1,), generator=draws.shared()))][1]
        times = torch.tensor([t for t, c in self.steps if c == compute], dtype=torch.float64, device=draws.device)
        t = times[draws.integers(len(times))]
        ends = self.coupling(batch, denoiser.path, draws)
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        return Loss(regression(denoiser, ends, t, labels, self.metric, self.space, compute).mean())

    def check(self, denoiser: Denoiser) -> None:
        for _, compute in self.steps:
            denoiser.patch_of(compute)

    def flops(self, denoiser: Denoiser) -> float:
        return 3.0 * sum(denoiser.flops(compute) for _, compute in self.steps) / len(self.steps)

"""Fixed-point correction of equilibrium transformers (GET): every iteration's image is compared with the teacher's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pliant.errors import ConfigError
from pliant.models.equilibrium import EquilibriumTransformer
from pliant.training.couplings import Coupling, Stored
from pliant.training.draws import Draws
from pliant.training.losses import AbsoluteError, Compared, Metric
from pliant.training.objectives.base import Batch, Loss

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class EquilibriumDistillation:
    """`sum_i decay^(I-1-i) metric(f_i(z), x)` over iterations i, on (noise, sample) pairs; divided by its weights."""

    metric: Metric = field(default_factory=AbsoluteError)
    decay: float = 0.8
    coupling: Coupling = field(default_factory=Stored)

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        network = denoiser.network
        assert isinstance(network, EquilibriumTransformer)  # checked
        ends = self.coupling(batch, denoiser.path, draws)
        t = torch.ones(len(batch), dtype=torch.float64, device=draws.device)
        errors = []
        for image in network.outputs(ends.x1, batch.labels):
            errors.append(self.metric(Compared(image, ends.x0, t, image.clone, ends.x0)).mean())
        weights = [self.decay ** (len(errors) - 1 - i) for i in range(len(errors))]
        total = torch.stack([w * e for w, e in zip(weights, errors, strict=True)]).sum() / sum(weights)
        return Loss(total, {"first": errors[0].detach(), "last": errors[-1].detach()})

    def check(self, denoiser: Denoiser) -> None:
        if not isinstance(denoiser.network, EquilibriumTransformer) or denoiser.prediction != "sample":
            raise ConfigError("get trains equilibrium transformers that predict samples: a model of `equilibrium`")

    def flops(self, denoiser: Denoiser) -> float:
        return 3.0 * denoiser.flops()

"""EDM's loss (arXiv 2206.00364) for preconditioned networks, and so PFGM++'s (2302.04265): only the noise differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from pliant.errors import ConfigError
from pliant.paths import like
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss, drop_labels

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class EDMLoss:
    """`E lambda(sigma) ||D(y + sigma n; sigma) - y||^2`, mean over elements; lambda = 1/c_out^2: plain MSE for F.

    ln sigma ~ N(mean, std^2). The noise has the path's own law: Student-t on PFGM++'s.
    """

    mean: float = -1.2
    std: float = 1.2
    class_dropout: float = 0.0

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        path, preconditioning = denoiser.path, denoiser.preconditioning
        assert preconditioning is not None  # checked before training
        low, high = path.trained_times
        t = path.time_of_noise_ratio(draws.each(self._sigma)).clamp(low, high)
        noise = draws.noise(path, batch.images.shape[1:])
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        clean = denoiser(path.mix(batch.images, noise, t), t, labels).to("sample")
        weight = preconditioning.loss_weight(path.noise_ratio(t))
        return Loss((like(weight, clean) * (clean.float() - batch.images).square()).mean())

    def _sigma(self, n: int, generator: Generator) -> Tensor:
        z = torch.randn(n, generator=generator, dtype=torch.float64)
        return torch.exp(self.mean + self.std * z)

    def check(self, denoiser: Denoiser) -> None:
        if denoiser.preconditioning is None:
            raise ConfigError("objective 'edm' trains preconditioned networks: `preconditioning: {kind: edm}`")
        if not denoiser.path.gaussian_source:
            raise ConfigError(f"objective 'edm' needs noise as source, not path {denoiser.path.name!r}")

    def flops(self, denoiser: Denoiser) -> float:
        return 3.0 * denoiser.flops()

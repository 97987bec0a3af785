"""Shortcut models (arXiv 2410.12557): two steps of a length teach one of twice the length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pliant.errors import ConfigError
from pliant.paths import like
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss, drop_labels
from pliant.training.objectives.mean_flow import check_flow_map, squared_norm

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class Shortcut:
    """Steps of length 2^-k on the dyadic grid, k = 0..octaves; the shortest learns the velocity, the others bootstrap.

    The two half steps are taken by the running average of the weights, which is guided at the shortest of them only:
    longer steps inherit guidance. Clipped as in the paper. The network is told the step's length in octaves in the
    paper and its two ends here; guided models are sampled without guidance.
    """

    teacher: Denoiser | None = None
    """Its (guided) velocity is what the shortest step learns; None: the data's."""
    guidance: float = 1.0
    octaves: int = 7
    bootstrap: float = 0.125
    """Share of the rows that bootstrap."""
    clip: float = 4.0
    class_dropout: float = 0.1
    average: Denoiser | None = None

    needs_partners = False

    def __post_init__(self) -> None:
        if self.octaves < 1 or not 0.0 <= self.bootstrap <= 1.0:
            raise ConfigError("shortcuts need at least 1 octave, and a share of bootstrap rows between 0 and 1")

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        octave = draws.integers(self.octaves)  # of the rows that bootstrap: steps of 2^-octave, made of two half ones
        halves = draws.uniform() < self.bootstrap
        octave = torch.where(halves, octave, torch.full_like(octave, self.octaves))
        count = 2.0 ** octave.double()
        end = torch.floor(draws.uniform().double() * count) / count
        t, length = end + 1.0 / count, 1.0 / count
        noise = draws.noise(denoiser.path, batch.images.shape[1:])
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        x = denoiser.path.mix(batch.images, noise, t)
        target = self._velocity(denoiser, batch, noise, x, t, labels)
        if len(rows := halves.nonzero().squeeze(1)):
            two = self._two_halves(denoiser, x[rows], t[rows], length[rows], octave[rows], labels[rows])
            target = target.index_copy(0, rows, two)
        answer = denoiser(x, t, labels, lands=torch.where(halves, end, t)).to("velocity")
        error = squared_norm(answer - target) / x[0].numel()
        return Loss(error.mean(), {"bootstrap": (error.detach() * halves).sum() / halves.sum().clamp(min=1)})

    def _velocity(
        self, denoiser: Denoiser, batch: Batch, noise: Tensor, x: Tensor, t: Tensor, labels: Tensor
    ) -> Tensor:
        if self.teacher is None:
            return denoiser.path.target("velocity", batch.images, noise, t)
        with torch.no_grad():
            return self._guided(self.teacher, x, t, t, labels, torch.ones_like(labels, dtype=torch.bool))

    @torch.no_grad()
    def _two_halves(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, length: Tensor, octave: Tensor, labels: Tensor
    ) -> Tensor:
        model = self.average or denoiser
        middle, shortest = t - 0.5 * length, octave == self.octaves - 1
        # The shortest half steps are the velocity itself, which is what flow rows teach.
        land = lambda a, b: torch.where(shortest, a, b)  # noqa: E731
        guide = shortest if self.teacher is None else torch.zeros_like(shortest)
        first = self._guided(model, x, t, land(t, middle), labels, guide)
        half = (x - like(0.5 * length, x) * first).clamp(-self.clip, self.clip)
        second = self._guided(model, half, middle, land(middle, t - length), labels, guide)
        return (0.5 * (first + second)).clamp(-self.clip, self.clip)

    def _guided(self, model: Denoiser, x: Tensor, t: Tensor, lands: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """The model's velocity for a step from t to lands, guided in the given rows."""
        told = lands if model.config.flow_map else None
        own = model(x, t, labels, lands=told).to("velocity")
        if self.guidance == 1.0 or not bool(rows.any()):
            return own
        null = model(x, t, torch.full_like(labels, model.null_label), lands=told).to("velocity")
        return torch.where(like(rows, x).bool(), null + self.guidance * (own - null), own)

    def check(self, denoiser: Denoiser) -> None:
        check_flow_map(denoiser, "shortcut")

    def flops(self, denoiser: Denoiser) -> float:
        guided = 1.0 if self.guidance == 1.0 else 2.0
        taught = 0.0 if self.teacher is None else guided * self.teacher.flops()
        halves = 2.0 * self.bootstrap * (guided if self.teacher is None else 1.0)
        return (3.0 + halves) * denoiser.flops() + taught

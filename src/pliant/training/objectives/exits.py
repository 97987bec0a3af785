"""Early exits imitate the full network (Balcony, arXiv 2503.05005, for a DiT: sheet E, section 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from pliant.compute import cost_parts
from pliant.errors import ConfigError
from pliant.paths import TimeDensity, VPDiscrete
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss, drop_labels
from pliant.training.objectives.flow_matching import _uniform

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser, Prediction

Weight: TypeAlias = Literal["one", "velocity"]


@dataclass(frozen=True)
class ExitDistillation:
    """`sum_e E w(t) || F_e(x_t, t, c) - sg F(x_t, t, c) ||^2` over all exits, teacher and exits from one pass.

    F is in the network's own prediction type. With variance channels, their code is regressed too with
    `variance_weight`. Labels are dropped as in training, so that the unconditional branch is learnt as well.
    """

    time: TimeDensity | None = None
    """None: uniform, over the table's entries when the path is a table."""
    times: tuple[float, ...] = ()
    """House times to draw from instead, each equally often: those of a plan."""
    weight: Weight = "one"
    """w(t): "one", or "velocity": the error as it appears in the velocity, whatever the network predicts."""
    class_dropout: float = 0.1
    variance_weight: float = 0.1

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        t = self._times(denoiser, draws)
        noise = draws.noise(denoiser.path, batch.images.shape[1:])
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        x = denoiser.path.mix(batch.images, noise, t)
        teacher, exits = denoiser.exit_predictions(x, t, labels)
        logs: dict[str, Tensor] = {}
        total = torch.zeros((), device=x.device)
        for depth, student in exits.items():
            gap = (self._read(student) - self._read(teacher)).square().mean()
            logs[f"gap_exit_{depth}"] = gap.detach()
            total = total + gap
            if student.variance is not None and teacher.variance is not None and self.variance_weight:
                codes = (student.variance.float() - teacher.variance.float()).square().mean()
                logs[f"variance_gap_exit_{depth}"] = codes.detach()
                total = total + self.variance_weight * codes
        return Loss(total, logs)

    def _read(self, prediction: Prediction) -> Tensor:
        return (prediction.value if self.weight == "one" else prediction.to("velocity")).float()

    def _times(self, denoiser: Denoiser, draws: Draws) -> Tensor:
        if self.times:
            known = torch.tensor(self.times, dtype=torch.float64, device=draws.device)
            return known[draws.integers(len(self.times))]
        path = denoiser.path
        if self.time is None and isinstance(path, VPDiscrete):
            return path.time_of_timestep(draws.integers(path.num_timesteps))
        return draws.each((self.time or _uniform()).sample)

    def check(self, denoiser: Denoiser) -> None:
        if not denoiser.exit_depths:
            raise ConfigError("objective 'exits' needs a model with exits; add them with `exits: {depths: [...]}`")

    def flops(self, denoiser: Denoiser) -> float:
        shape, parts = denoiser.shape(), cost_parts(denoiser.shape())
        block = (parts.self_projections + parts.self_attention + parts.mlp) / shape.depth + 6 * shape.width**2
        # Exits are run forwards and, at twice the cost, backwards; of the head only the way back to its input.
        return denoiser.flops() + 2.0 * len(denoiser.exit_depths) * (3.0 * block + 2.0 * parts.final)

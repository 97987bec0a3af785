"""Straightening the segments of a schedule (BOSS, arXiv 2312.16414): one Euler step from anchor to anchor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pliant.compute import Compute
from pliant.errors import ConfigError
from pliant.paths import like
from pliant.training.draws import Draws
from pliant.training.losses import Compared, Metric, SquaredError
from pliant.training.objectives.base import Batch, Loss, drop_labels

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class SegmentStraightening:
    """`E || v(x_k, t_k) - (x_{k+1} - x_k)/(t_{k+1} - t_k) ||^2` on states of the teacher's own trajectories.

    times: the K+1 anchors, from noise to data; batches carry the states there, (B, K+1, C, H, W), as `sources`.
    """

    times: tuple[float, ...]
    metric: Metric = field(default_factory=SquaredError)
    class_dropout: float = 0.0

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        states = batch.sources
        if states is None or states.ndim != 5 or states.shape[1] != len(self.times):
            raise ConfigError(f"this objective needs trajectories at {len(self.times)} times (pliant distill boss)")
        grid = torch.tensor(self.times, dtype=torch.float64, device=draws.device)
        k = draws.integers(len(self.times) - 1)
        rows = torch.arange(len(batch), device=draws.device)
        x, after, t, s = states[rows, k], states[rows, k + 1], grid[k], grid[k + 1]
        target = (after - x) / like(s - t, x)
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        prediction = denoiser(x, t, labels, Compute())
        velocity = prediction.to("velocity")
        return Loss(self.metric(Compared(velocity, target, t, lambda: prediction.to("sample"), batch.images)).mean())

    def check(self, denoiser: Denoiser) -> None:
        if len(self.times) < 2:
            raise ConfigError("a schedule has at least 2 times")

    def flops(self, denoiser: Denoiser) -> float:
        return 3.0 * denoiser.flops()

"""Consistency trajectory distillation (CTM, arXiv 2310.02279): jumps from any time to any cleaner one.

A jump t -> s must end where the teacher's flow from t to an intermediate u, and then the map's jump u -> s, ends;
both are compared as clean images, after a last jump s -> 0 by the averaged weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pliant.errors import ConfigError
from pliant.training.critic import Critic
from pliant.training.draws import Draws
from pliant.training.losses import Compared, Metric, SquaredError
from pliant.training.objectives.base import Batch, Loss, drop_labels
from pliant.training.objectives.jumps import heun_step, jump

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


@dataclass(frozen=True)
class TrajectoryConsistency:
    """CTM's soft consistency loss, its denoising loss and an adversarial one, balanced by last-layer gradients."""

    teacher: Denoiser
    times: tuple[float, ...]
    """Descending house times, from the noisiest to clean."""
    most: int = 8
    """The teacher takes 1 to so many Heun steps of the grid, long flights more often (probability ~ length)."""
    guidance: float = 1.0
    metric: Metric = field(default_factory=SquaredError)
    denoising: float = 1.0
    """Weight of the denoising loss (velocity matching where the jump has no length); 0: without."""
    class_dropout: float = 0.0
    critic: Critic | None = None
    """Tells samples from data, and trains beside the map; None: no adversarial term."""
    adversarial: float = 0.1
    """Weight of the adversarial term, relative to the consistency's gradient."""
    after: int = 0
    """Step from which it counts; the critic trains from the start."""
    average: Denoiser | None = None

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        grid = torch.tensor(self.times, dtype=torch.float64, device=draws.device)
        last = len(grid) - 1
        lengths = torch.arange(1, min(self.most, last) + 1, dtype=torch.float64)
        # One flight length for the batch, so that all rows take as many teacher steps.
        flight = 1 + int(torch.multinomial(lengths, 1, generator=draws.shared()))
        start = (draws.uniform().double() * (last + 1 - flight)).long().clamp(max=last - flight)
        reached = start + flight
        landing = reached + (draws.uniform().double() * (last + 1 - reached)).long()
        landing = torch.minimum(landing, torch.full_like(landing, last))
        path = denoiser.path
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        noise = draws.noise(path, batch.images.shape[1:])
        x = path.mix(batch.images, noise, grid[start])
        target, clean = self.target(denoiser, x, grid, start, flight, landing, labels)
        landed = jump(denoiser, x, grid[start], grid[landing], labels)
        estimate = jump(self.average or denoiser, landed, grid[landing], torch.zeros_like(clean), labels)
        compared = Compared(estimate, target, grid[start], lambda: estimate, target)
        consistency = self.metric(compared).mean()
        total, logs = consistency, {"consistency": consistency.detach()}
        if self.denoising:
            matching = self._denoising(denoiser, batch, draws, labels)
            total = total + self.denoising * balance(denoiser, consistency, matching) * matching
            logs["denoising"] = matching.detach()
        if self.critic is not None:
            judged = self.critic.hinge(batch.images, estimate, labels)
            total, logs["critic"] = total + judged, judged.detach()
            if draws.step >= self.after:
                fooled = -self.critic.frozen(estimate, labels).mean()
                total = total + self.adversarial * balance(denoiser, consistency, fooled, 0.01, 10.0) * fooled
                logs["adversarial"] = fooled.detach()
        return Loss(total, logs)

    @torch.no_grad()
    def target(
        self,
        denoiser: Denoiser,
        x: Tensor,
        grid: Tensor,
        start: Tensor,
        flight: int,
        landing: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The clean images that the jumps must lead to, (B, C, H, W), and the times where they are (B,): zero.

        The teacher flies `flight` steps of the grid from `start` (B,), the map jumps on to `landing` (B,), and the
        averaged map to clean data.
        """
        for k in range(flight):
            x = heun_step(self.teacher, x, grid[start + k], grid[start + k + 1], labels, self.guidance)
        x = jump(denoiser, x, grid[start + flight], grid[landing], labels)
        zero = torch.zeros_like(grid[landing])
        return jump(self.average or denoiser, x, grid[landing], zero, labels), zero

    def _denoising(self, denoiser: Denoiser, batch: Batch, draws: Draws, labels: Tensor) -> Tensor:
        """Velocity matching with the data, where the map lands where it is."""
        t = draws.uniform().double() * self.times[0]
        t = t.clamp(min=1e-3)
        noise = draws.noise(denoiser.path, batch.images.shape[1:])
        x = denoiser.path.mix(batch.images, noise, t)
        target = denoiser.path.target("velocity", batch.images, noise, t)
        return (denoiser(x, t, labels, lands=t).to("velocity") - target).square().mean()

    def check(self, denoiser: Denoiser) -> None:
        check_jumps(denoiser, self.teacher, self.times, "ctm")
        if self.most < 1:
            raise ConfigError("ctm's teacher takes at least 1 step")

    def flops(self, denoiser: Denoiser) -> float:
        guided = 1.0 if self.guidance == 1.0 else 2.0
        most = min(self.most, len(self.times) - 1)
        flights = sum(k * k for k in range(1, most + 1)) / sum(range(1, most + 1))
        own = 3.0 + 2.0 + 2.0 + (3.0 if self.denoising else 0.0)  # jump, through the average, target, denoising
        return own * denoiser.flops() + 2.0 * flights * guided * self.teacher.flops()


def balance(
    denoiser: Denoiser, main: Tensor, other: Tensor, least: float = 0.0, most: float = 1e4
) -> Tensor | float:
    """`|grad main| / |grad other|` at the last layer, between least and most: what makes `other` count as much.

    1 without gradients.
    """
    # A flexible network has a head per patch size, and a call uses one of them.
    heads = [p for name, p in denoiser.network.named_parameters() if "head" in name and p.requires_grad]
    if not heads or not torch.is_grad_enabled():
        return 1.0
    sizes = []
    for loss in (main, other):
        found = torch.autograd.grad(loss, heads, retain_graph=True, allow_unused=True)
        sizes.append(torch.stack([g.norm() for g in found if g is not None]).norm())
    return (sizes[0] / (sizes[1] + 1e-4)).clamp(least, most)


def check_jumps(denoiser: Denoiser, teacher: Denoiser, times: tuple[float, ...], what: str) -> None:
    """Raise ConfigError unless the student is a flow map on the teacher's path and the grid leads down to clean
    data."""
    if not denoiser.config.flow_map:
        raise ConfigError(f"{what} trains flow maps: set model.flow_map to true")
    if teacher.path != denoiser.path:
        raise ConfigError(f"{what} keeps the teacher's path, but the student has another one")
    if len(times) < 2 or list(times) != sorted(set(times), reverse=True) or times[-1] != 0.0:
        raise ConfigError(f"{what} takes at least 2 descending times that end at 0")

"""Continuous-time consistency (sCM, arXiv 2410.11081) of rectified-flow networks, through TrigFlow.

On `x_a = cos(a) x0 + sin(a) z` an angle a in [0, pi/2], a network F with `dx/da = F` has the clean data
`f = cos(a) x - sin(a) F`. A consistency model is the F whose f is the same along a trajectory; the loss moves F
along the derivative of f, which one forward-mode derivative gives. A rectified flow is such an F after a change of
variables: state `x/(cos a + sin a)` at time `sin a/(cos a + sin a)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from pliant.errors import ConfigError
from pliant.paths import like
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss, drop_labels

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


def trig_velocity(denoiser: Denoiser, x: Tensor, angle: Tensor, labels: Tensor, guidance: float = 1.0) -> Tensor:
    """F(x, a) of a rectified flow at TrigFlow states x (B, C, H, W) and angles (B,): `((cos - sin) x + v)/(cos +
    sin)`."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    total = cos + sin
    state, time = x / like(total, x), sin / total
    v = denoiser(state, time, labels).to("velocity")
    if guidance != 1.0:
        null = denoiser(state, time, torch.full_like(labels, denoiser.null_label)).to("velocity")
        v = null + guidance * (v - null)
    return (like(cos - sin, x) * x + v) / like(total, x)


@dataclass(frozen=True)
class TrigConsistency:
    """sCM's loss `|| F - sg[F + g] ||^2` with the normalised tangent g; clean data as x0 = x - t v stays what the
    network says at every time, so samples come from one call, or from a few with fresh noise (`flow-stochastic`).

    Angles are `arctan(e^tau)`, tau normal. warmup: steps over which the unstable terms of g come in.
    """

    teacher: Denoiser | None = None
    """Its flow is followed (distillation); None: the data's (training)."""
    guidance: float = 1.0
    mean: float = -0.8
    std: float = 1.6
    offset: float = 0.1
    warmup: int = 1000
    class_dropout: float = 0.0
    window: float = 0.0
    """Of the angle, before and after, over which dF/da is averaged (networks that are told 1000 t ripple: see
    `velocity_and_difference`); 0: the derivative at the point, as in the paper, whose networks are told t itself."""

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        tau = self.mean + self.std * draws.each(lambda n, g: torch.randn(n, generator=g, dtype=torch.float64))
        angle = torch.atan(torch.exp(tau)).clamp(1e-3, math.pi / 2 - 1e-4)
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        noise = draws.noise(denoiser.path, batch.images.shape[1:])
        cos, sin = like(torch.cos(angle), noise), like(torch.sin(angle), noise)
        x = cos * batch.images + sin * noise
        if self.teacher is None:
            flow = cos * noise - sin * batch.images
        else:
            with torch.no_grad():
                flow = trig_velocity(self.teacher, x, angle, labels, self.guidance)
        answer, moved = self._derivative(denoiser, x, angle, labels, flow)
        share = min(1.0, draws.step / self.warmup) if self.warmup else 1.0
        tangent = -(cos**2) * (answer.detach() - flow) - share * (cos * sin * x + moved)
        size = tangent.flatten(1).norm(dim=1)
        error = (answer - answer.detach() - tangent / (like(size, x) + self.offset)).square().mean()
        return Loss(error, {"tangent": size.mean()})

    def _derivative(
        self, denoiser: Denoiser, x: Tensor, angle: Tensor, labels: Tensor, flow: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(F, cos sin dF/da along the flow): tangents are scaled before, which is stable where the derivative is
        not."""
        scale = torch.cos(angle) * torch.sin(angle)
        if self.window:
            value = trig_velocity(denoiser, x, angle, labels)
            with torch.no_grad():
                later, earlier = (angle + self.window).clamp(max=math.pi / 2), (angle - self.window).clamp(min=1e-3)
                after = trig_velocity(denoiser, x + like(later - angle, x) * flow, later, labels)
                before = trig_velocity(denoiser, x - like(angle - earlier, x) * flow, earlier, labels)
            return value, like(scale / (later - earlier), x) * (after - before)
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            state = forward_ad.make_dual(x, like(scale, x) * flow)
            answer = trig_velocity(denoiser, state, forward_ad.make_dual(angle, scale), labels)
            value, derivative = forward_ad.unpack_dual(answer)
        return value, torch.zeros_like(value) if derivative is None else derivative.detach()

    def check(self, denoiser: Denoiser) -> None:
        if denoiser.path.name != "linear" or denoiser.prediction != "velocity" or denoiser.config.flow_map:
            raise ConfigError("scm trains rectified flows (velocity on the linear path) that are no flow maps")

    def flops(self, denoiser: Denoiser) -> float:
        taught = 0.0 if self.teacher is None else (1.0 if self.guidance == 1.0 else 2.0) * self.teacher.flops()
        return (5.0 if self.window else 4.0) * denoiser.flops() + taught

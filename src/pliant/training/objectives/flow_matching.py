"""Flow matching: regress the velocity of the path."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from pliant.compute import Compute
from pliant.errors import ConfigError
from pliant.paths import TimeDensity, get_time_density
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss, drop_labels

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


def _uniform() -> TimeDensity:
    return get_time_density("uniform")


@dataclass(frozen=True)
class FlowMatching:
    """`E || v_theta(x_t, t, c) - dx_t/dt ||^2`, mean over elements (arXiv 2210.02747, eq. 14).

    Works on any path with a Gaussian source and any prediction type: the network's output is converted to a
    velocity. Paths whose velocity is infinite at t=0 (vp, cosine, vp-discrete) need times away from it, e.g.
    `time={"name": "uniform", "low": 1e-3}`.
    """

    time: TimeDensity = field(default_factory=_uniform)
    class_dropout: float = 0.1

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws, compute: Compute | None = None) -> Loss:
        t = draws.each(self.time.sample)
        noise = draws.noise(denoiser.path, batch.images.shape[1:])
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        x = denoiser.path.mix(batch.images, noise, t)
        target = denoiser.path.target("velocity", batch.images, noise, t)
        velocity = denoiser(x, t, labels, compute or Compute()).to("velocity")
        return Loss(_mse(velocity, target))

    def check(self, denoiser: Denoiser) -> None:
        if not denoiser.path.gaussian_source:
            raise ConfigError(f"flow_matching trains paths with a Gaussian source, not {denoiser.path.name!r}")

    def flops(self, denoiser: Denoiser) -> float:
        return 3.0 * denoiser.flops(Compute())


def _mse(value: Tensor, target: Tensor) -> Tensor:
    return (value.float() - target).square().mean()

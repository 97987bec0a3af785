"""Flow matching: regress the velocity of the path, on any coupling of data and noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from pliant.compute import Compute
from pliant.errors import ConfigError
from pliant.paths import PredictionType, TimeDensity, get_time_density, prediction_type
from pliant.training.couplings import Coupling, Ends, Independent
from pliant.training.draws import Draws
from pliant.training.losses import Compared, Metric, SquaredError
from pliant.training.objectives.base import Batch, Loss, drop_labels

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


def _uniform() -> TimeDensity:
    return get_time_density("uniform")


@dataclass(frozen=True)
class FlowMatching:
    """`E || v_theta(x_t, t, c) - dx_t/dt ||^2`, mean over elements (arXiv 2210.02747, eq. 14; 2209.03003, eq. 1).

    Works on any path with a Gaussian source and any prediction type: the network's output is converted to `space`, a
    velocity unless said otherwise. Paths whose velocity is infinite at t=0 (vp, cosine, vp-discrete) need times away
    from it, e.g. `time={"name": "uniform", "low": 1e-3}`, or another space.

    coupling: `Independent` is plain flow matching, `Stored` pairs of a teacher are reflow, on the linear path, and
    Rectified Diffusion (arXiv 2410.07303) on any other. metric: other than the squared error only for pairs.
    """

    time: TimeDensity = field(default_factory=_uniform)
    class_dropout: float = 0.1
    coupling: Coupling = field(default_factory=Independent)
    metric: Metric = field(default_factory=SquaredError)
    space: PredictionType = "velocity"

    needs_partners = False

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws, compute: Compute | None = None) -> Loss:
        t = draws.each(self.time.sample)
        ends = self.coupling(batch, denoiser.path, draws)
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        return Loss(regression(denoiser, ends, t, labels, self.metric, self.space, compute).mean())

    def check(self, denoiser: Denoiser) -> None:
        if not denoiser.path.gaussian_source:
            raise ConfigError(
                f"flow_matching trains paths with a Gaussian source, not {denoiser.path.name!r}: see 'interpolant'"
            )
        prediction_type(self.space)

    def flops(self, denoiser: Denoiser) -> float:
        return 3.0 * denoiser.flops(Compute())


def regression(
    denoiser: Denoiser,
    ends: Ends,
    t: Tensor,
    labels: Tensor,
    metric: Metric,
    space: PredictionType = "velocity",
    compute: Compute | None = None,
) -> Tensor:
    """(B,) metric of the prediction at x_t between `ends` against what the pair says, as predictions of `space`."""
    path = denoiser.path
    x = path.mix(ends.x0, ends.x1, t)
    prediction = denoiser(x, t, labels, compute or Compute())
    return metric(
        Compared(
            prediction.to(space),
            path.target(space, ends.x0, ends.x1, t),
            t,
            lambda: prediction.to("sample"),
            ends.x0,
        )
    )

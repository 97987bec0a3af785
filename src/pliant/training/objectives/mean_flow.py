"""MeanFlow (arXiv 2505.13447): learn the mean velocity of whole jumps, so that one call is one sample.

The mean velocity `u(x_t, t, s) = 1/(t - s) int_s^t v` satisfies `u = v - (t - s) du/dt` along the trajectory, which
is a regression target that needs no teacher. With one, v is the teacher's (guided) velocity: the same identity, less
noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pliant.errors import ConfigError
from pliant.paths import TimeDensity, get_time_density, like
from pliant.training.draws import Draws
from pliant.training.objectives.base import Batch, Loss, drop_labels
from pliant.training.objectives.jump_times import jump_times
from pliant.training.objectives.jvp import velocity_and_derivative, velocity_and_difference

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser


def logit_normal() -> TimeDensity:
    """The paper's density of times."""
    return get_time_density("logit-normal", mean=-0.4, std=1.0)


def check_flow_map(denoiser: Denoiser, what: str) -> None:
    """Raise ConfigError unless `denoiser` is a flow map on the linear path that predicts velocities."""
    if not denoiser.config.flow_map:
        raise ConfigError(f"{what} trains flow maps: set model.flow_map to true")
    if denoiser.path.name != "linear" or denoiser.prediction != "velocity":
        raise ConfigError(
            f"{what} needs velocity predictions on the linear path, not {denoiser.prediction} on "
            f"{denoiser.path.name!r}; train a rectified flow first, or use the recipe 'ctm'"
        )


def adaptive(error: Tensor, power: float = 1.0, offset: float = 0.01) -> Tensor:
    """Per-sample squared errors (B,), each divided by its own size: `e / sg(e + offset)^power`."""
    return error / (error.detach() + offset) ** power


def squared_norm(value: Tensor) -> Tensor:
    """(B, ...) -> (B,): sum of squares over a sample."""
    return value.float().square().flatten(1).sum(1)


def learned_velocity(
    denoiser: Denoiser,
    teacher: Denoiser | None,
    guidance: float,
    mixing: float,
    batch: Batch,
    noise: Tensor,
    x: Tensor,
    t: Tensor,
    labels: Tensor,
) -> Tensor:
    """What the mean velocity is a mean of, at states x (B, C, H, W) and times t (B,): the teacher's velocity, or the
    data's.

    guidance: classifier-free scale that is learned into the map. mixing: kappa, without a teacher, how much of the
    guided velocity is the map's own conditional prediction: the effective scale is guidance / (1 - mixing). Rows
    with the null label are not guided.
    """
    plain = guidance == 1.0 and mixing == 0.0
    own = denoiser.path.target("velocity", batch.images, noise, t) if teacher is None else None
    if plain and own is not None:
        return own
    with torch.no_grad():
        if teacher is not None:
            conditional = teacher(x, t, labels).to("velocity")
            if plain:
                return conditional
            unconditional = teacher(x, t, torch.full_like(labels, teacher.null_label)).to("velocity")
            return unconditional + guidance * (conditional - unconditional)
        assert own is not None
        unconditional = denoiser(x, t, torch.full_like(labels, denoiser.null_label)).to("velocity")
        mixed = guidance * own + (1.0 - guidance - mixing) * unconditional
        if mixing:
            mixed = mixed + mixing * denoiser(x, t, labels).to("velocity")
        nameless = (labels == denoiser.null_label)[:, None, None, None]
        return torch.where(nameless, own, mixed)


def velocity_flops(denoiser: Denoiser, teacher: Denoiser | None, guidance: float, mixing: float) -> float:
    """FLOPs of `learned_velocity`'s calls per image."""
    if teacher is not None:
        return (1.0 if guidance == 1.0 else 2.0) * teacher.flops()
    return (float(guidance != 1.0 or mixing != 0.0) + float(mixing != 0.0)) * denoiser.flops()


@dataclass(frozen=True)
class MeanVelocity:
    """What all losses of mean velocities share: whose velocities, at which times, and how samples are weighed."""

    teacher: Denoiser | None = None
    guidance: float = 1.0
    mixing: float = 0.0
    time: TimeDensity = field(default_factory=logit_normal)
    still: float = 0.5
    """Share of the rows whose jump has no length: ordinary flow matching."""
    power: float = 1.0
    class_dropout: float = 0.1

    name: ClassVar[str]
    """In configs, and in messages."""
    passes: ClassVar[float]
    """Forward passes of the network that a training step costs, but for those of `learned_velocity`."""
    needs_partners = False

    def begin(
        self, denoiser: Denoiser, batch: Batch, draws: Draws, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(x, labels, v): states at times t (B,), their labels, some dropped, and the velocities there."""
        noise = draws.noise(denoiser.path, batch.images.shape[1:])
        labels = drop_labels(batch, denoiser, self.class_dropout, draws)
        x = denoiser.path.mix(batch.images, noise, t)
        v = learned_velocity(denoiser, self.teacher, self.guidance, self.mixing, batch, noise, x, t, labels)
        return x, labels, v

    def check(self, denoiser: Denoiser) -> None:
        check_flow_map(denoiser, self.name)

    def flops(self, denoiser: Denoiser) -> float:
        return self.passes * denoiser.flops() + velocity_flops(denoiser, self.teacher, self.guidance, self.mixing)


@dataclass(frozen=True)
class Derived(MeanVelocity):
    """Losses of mean velocities with the derivative of the map along the trajectory."""

    window: float = 0.0
    """Time before and after over which the derivative is averaged; 0: the derivative at the point, as in the papers."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.window < 1.0:
            raise ConfigError(f"the window of a derivative is a length of time in [0, 1), not {self.window}")

    def derivative(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, labels: Tensor, v: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(u, du): the map's mean velocity from t to s, and its change along velocities v, without gradient."""
        if self.window:
            return velocity_and_difference(denoiser, x, t, labels, v, s, self.window)
        return velocity_and_derivative(denoiser, x, t, labels, v, lands=s)

    def flops(self, denoiser: Denoiser) -> float:
        return super().flops(denoiser) + (denoiser.flops() if self.window else 0.0)


@dataclass(frozen=True)
class MeanFlow(Derived):
    """`|| u - sg[v - (t - s) du/dt] ||^2`, each sample's divided by its size (power 1: robust, but uninformative as a
    number: `error` is logged)."""

    still: float = 0.75

    name = "mean-flow"
    passes = 4.0  # the derivative at a point is about one more forward pass

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> Loss:
        t, s = jump_times(self.time, self.still, draws)
        x, labels, v = self.begin(denoiser, batch, draws, t)
        u, du = self.derivative(denoiser, x, t, labels, v, s)
        error = squared_norm(u - (v - like(t - s, x) * du))
        return Loss(adaptive(error, self.power).mean(), {"error": error.detach().mean() / x[0].numel()})

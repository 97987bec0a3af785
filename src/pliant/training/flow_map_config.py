"""Configuration of the objectives that make flow maps and consistency models."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.training.critic import Critic
from pliant.training.flow_config import MetricConfig, density, load_teacher
from pliant.training.objectives.alpha_flow import AlphaFlow, Curriculum
from pliant.training.objectives.base import Objective
from pliant.training.objectives.equilibrium import EquilibriumDistillation
from pliant.training.objectives.improved_mean_flow import ImprovedMeanFlow
from pliant.training.objectives.mean_flow import MeanFlow
from pliant.training.objectives.refiner import VelocityRefiner
from pliant.training.objectives.segmented import SegmentedConsistency
from pliant.training.objectives.shortcut import Shortcut
from pliant.training.objectives.split_mean_flow import SplitMeanFlow
from pliant.training.objectives.trajectory import TrajectoryConsistency
from pliant.training.objectives.trig_consistency import TrigConsistency
from pliant.training.section import ObjectiveSection

Dropout = Field(default=0.0, ge=0, le=1)


def _teacher(source: str | None) -> Denoiser | None:
    """The frozen teacher, if one is named."""
    return None if source is None else load_teacher(source, "objective.teacher")


class _Velocities(ObjectiveSection):
    """Whose velocities a map is a mean of, and where it is trained."""

    teacher: str | None = None
    """A trained flow; null: the data's own velocities (training from scratch)."""
    guidance: float = Field(default=1.0, ge=0)
    """Classifier-free scale that is learned into the map."""
    mixing: float = Field(default=0.0, ge=0, lt=1)
    """kappa, without a teacher: the effective scale is guidance / (1 - mixing)."""
    time: str | dict[str, Any] = Field(default_factory=lambda: {"name": "logit-normal", "mean": -0.4, "std": 1.0})
    still: float = Field(default=0.5, ge=0, le=1)
    """Share of rows whose jump has no length."""
    power: float = Field(default=1.0, ge=0)
    """Of the adaptive weight: each sample's squared error is divided by (itself + 0.01)^power."""
    class_dropout: float = Dropout

    def _options(self, denoiser: Denoiser) -> dict[str, Any]:
        if self.mixing and self.teacher is not None:
            raise ConfigError("objective.mixing is for training without a teacher")
        if (self.mixing or self.guidance != 1.0) and self.teacher is None:
            _ = denoiser.null_label  # guidance needs an unconditional mode
        return {
            "teacher": _teacher(self.teacher),
            "guidance": self.guidance,
            "mixing": self.mixing,
            "time": density(self.time),
            "still": self.still,
            "power": self.power,
            "class_dropout": self.class_dropout,
        }


class _Derived(_Velocities):
    window: float = Field(default=0.0, ge=0, lt=1)
    """Time before and after over which the derivative is averaged (0: at the point, by forward-mode differentiation).
    Networks that are told 1000 t need one, of about 0.03: see `velocity_and_difference`."""


class MeanFlowConfig(_Derived):
    """MeanFlow, arXiv 2505.13447."""

    name: Literal["mean-flow"]
    still: float = Field(default=0.75, ge=0, le=1)

    def build(self, denoiser: Denoiser) -> Objective:
        return MeanFlow(window=self.window, **self._options(denoiser))


class ImprovedMeanFlowConfig(_Derived):
    """Improved MeanFlow, arXiv 2512.02012."""

    name: Literal["improved-mean-flow"]

    def build(self, denoiser: Denoiser) -> Objective:
        return ImprovedMeanFlow(window=self.window, **self._options(denoiser))


class AlphaFlowConfig(_Velocities):
    """alpha-Flow, arXiv 2510.20771."""

    name: Literal["alpha-flow"]
    first: int = Field(default=0, ge=0)
    """Step at which alpha begins to fall from 1."""
    last: int = Field(default=1000, ge=1)
    """Step from which it is `least`."""
    least: float = Field(default=0.05, gt=0, le=1)

    def build(self, denoiser: Denoiser) -> Objective:
        return AlphaFlow(alpha=Curriculum(self.first, self.last, self.least), **self._options(denoiser))


class SplitMeanFlowConfig(_Velocities):
    """SplitMeanFlow, arXiv 2507.16884."""

    name: Literal["split-mean-flow"]

    def build(self, denoiser: Denoiser) -> Objective:
        return SplitMeanFlow(**self._options(denoiser))


class ShortcutConfig(ObjectiveSection):
    """Shortcut models, arXiv 2410.12557. The targets' network is the run's own average (`ema`)."""

    name: Literal["shortcut"]
    teacher: str | None = None
    guidance: float = Field(default=1.0, ge=0)
    octaves: int = Field(default=7, ge=1)
    bootstrap: float = Field(default=0.125, ge=0, le=1)
    clip: float = Field(default=4.0, gt=0)
    class_dropout: float = Dropout

    def build(self, denoiser: Denoiser) -> Objective:
        return Shortcut(
            _teacher(self.teacher), self.guidance, self.octaves, self.bootstrap, self.clip, self.class_dropout
        )


class TrajectoryConfig(ObjectiveSection):
    """Consistency trajectory distillation, arXiv 2310.02279."""

    name: Literal["ctm"]
    teacher: str
    intervals: int = Field(default=18, ge=1)
    """Steps of the teacher's grid, equal in time."""
    times: list[float] | None = None
    """Instead: descending house times, ending at 0."""
    most: int = Field(default=8, ge=1)
    """Longest flight of the teacher, in steps of the grid."""
    guidance: float = Field(default=1.0, ge=0)
    metric: MetricConfig = MetricConfig()
    denoising: float = Field(default=1.0, ge=0)
    adversarial: float = Field(default=0.0, ge=0)
    """Weight of the adversarial term; 0: there is no critic."""
    after: int = Field(default=0, ge=0)
    """Step from which it counts."""
    class_dropout: float = Dropout

    def build(self, denoiser: Denoiser) -> Objective:
        times = self.times or torch.linspace(1.0, 0.0, self.intervals + 1, dtype=torch.float64).tolist()
        teacher = load_teacher(self.teacher, "objective.teacher")
        metric = self.metric.build()
        return TrajectoryConsistency(
            teacher, tuple(times), self.most, self.guidance, metric, self.denoising, self.class_dropout,
            self._critic(denoiser), self.adversarial, self.after,
        )  # fmt: skip

    def _critic(self, denoiser: Denoiser) -> Critic | None:
        if not self.adversarial:
            return None
        channels, height, width = denoiser.sample_shape
        return Critic(channels, denoiser.num_classes, max(height, width))


class SegmentedConfig(ObjectiveSection):
    """Trajectory-segmented consistency distillation, arXiv 2404.13686: one stage."""

    name: Literal["tscd"]
    teacher: str
    segments: int = Field(default=4, ge=1)
    steps: int = Field(default=32, ge=1)
    """Of the teacher's grid; a multiple of the segments."""
    guidance: float = Field(default=1.0, ge=0)
    metric: MetricConfig = MetricConfig()
    class_dropout: float = Dropout

    def build(self, denoiser: Denoiser) -> Objective:
        teacher = load_teacher(self.teacher, "objective.teacher")
        return SegmentedConsistency(
            teacher, self.segments, self.steps, self.guidance, self.metric.build(), self.class_dropout
        )


class TrigConsistencyConfig(ObjectiveSection):
    """sCM, arXiv 2410.11081, of a rectified flow."""

    name: Literal["scm"]
    teacher: str | None = None
    guidance: float = Field(default=1.0, ge=0)
    mean: float = -0.8
    std: float = Field(default=1.6, gt=0)
    warmup: int = Field(default=1000, ge=0)
    window: float = Field(default=0.0, ge=0, lt=1)
    """Of the angle, over which the tangent's derivative is averaged (0: at the point)."""
    class_dropout: float = Dropout

    def build(self, denoiser: Denoiser) -> Objective:
        return TrigConsistency(
            _teacher(self.teacher), self.guidance, self.mean, self.std, warmup=self.warmup,
            class_dropout=self.class_dropout, window=self.window,
        )  # fmt: skip


class EquilibriumObjective(ObjectiveSection):
    """GET's regression of pairs, at every iteration."""

    name: Literal["equilibrium"]
    metric: MetricConfig = MetricConfig(name="l1")
    decay: float = Field(default=0.8, gt=0, le=1)

    def build(self, denoiser: Denoiser) -> Objective:
        return EquilibriumDistillation(self.metric.build(), self.decay)


class RefinerConfig(ObjectiveSection):
    """FlowTurbo's velocity refiner, arXiv 2409.18128."""

    name: Literal["refiner"]
    teacher: str
    longest: float = Field(default=0.12, gt=0, lt=1)
    class_dropout: float = Field(default=0.1, ge=0, le=1)

    def build(self, denoiser: Denoiser) -> Objective:
        return VelocityRefiner(load_teacher(self.teacher, "objective.teacher"), self.longest, self.class_dropout)

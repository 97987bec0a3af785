"""Configuration of the objectives that make few-step models, and of EDM's and the interpolants' losses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field

from pliant.denoiser import Denoiser
from pliant.errors import ConfigError
from pliant.paths import prediction_type
from pliant.training.flow_config import CouplingConfig, MetricConfig, PlanConfig, density, load_teacher
from pliant.training.models import Runner
from pliant.training.objectives import (
    Consistency,
    EDMLoss,
    FlowGuided,
    InterpolantMatching,
    Objective,
    Phased,
    RolloutDistillation,
    SegmentStraightening,
    StepDistillation,
)
from pliant.training.section import ObjectiveSection

Kind = Literal["velocity", "epsilon", "sample", "v_prediction", "score"]
Share = Field(default=0.0, ge=0, le=1)


class StepsConfig(ObjectiveSection):
    """Direct distillation to the steps of a plan, from pairs."""

    name: Literal["few-steps"]
    plan: PlanConfig = PlanConfig(steps=1)
    """The student's: its times and computes are what is trained."""
    metric: MetricConfig = MetricConfig()
    space: Kind = "velocity"
    class_dropout: float = Share
    coupling: CouplingConfig = CouplingConfig(name="stored")
    states: Literal["chord", "own"] = "chord"
    """Of later steps: on the chord of the pair, or where the student's own earlier steps lead from the pair's noise."""

    def build(self, denoiser: Denoiser) -> Objective:
        plan = self.plan.build(denoiser)
        if any(step.solver.evaluations_per_step != 1 for step in plan.steps):
            raise ConfigError("distillation to steps needs a solver of one call per step, such as euler or ddim")
        # Networks in training run as they are stored: neither merged adapters nor another precision.
        steps = tuple((s.t, s.compute.of(s.compute.patch, merged=False)) for s in plan.steps)
        kind = StepDistillation if self.states == "chord" else RolloutDistillation
        return kind(
            steps, self.metric.build(), prediction_type(self.space), self.class_dropout, self.coupling.build()
        )


class FlowGuidedConfig(ObjectiveSection):
    """SlimFlow's distillation: pairs, and the student's own step finished by the teacher."""

    name: Literal["flow-guided"]
    teacher: str
    """A straightened model: its one step is the target's second half."""
    metric: MetricConfig = MetricConfig()
    low: float = Field(default=0.2, ge=0, lt=1)
    high: float = Field(default=0.8, ge=0, lt=1)
    weight: float = Field(default=1.0, ge=0)
    class_dropout: float = Share

    def build(self, denoiser: Denoiser) -> Objective:
        teacher = load_teacher(self.teacher, "objective.teacher")
        return FlowGuided(teacher, self.metric.build(), self.low, self.high, self.weight, self.class_dropout)


class PhasedConfig(ObjectiveSection):
    """Phased rectification on real data."""

    name: Literal["phased"]
    teacher: str
    phases: int = Field(default=4, ge=1)
    """Equal parts of the time axis."""
    boundaries: list[float] | None = None
    """Instead: house times, ascending from 0."""
    steps: int = Field(default=10, ge=1)
    """DDIM steps of the teacher in each phase."""
    guidance: float = Field(default=1.0, ge=0)
    metric: MetricConfig = MetricConfig(name="element-huber")
    class_dropout: float = Share

    def build(self, denoiser: Denoiser) -> Objective:
        from pliant.plans import uniform

        teacher = load_teacher(self.teacher, "objective.teacher")
        ends = self.boundaries or torch.linspace(0.0, 1.0, self.phases + 1, dtype=torch.float64).tolist()
        if len(ends) < 2 or ends != sorted(set(ends)):
            raise ConfigError(f"phases need at least 2 ascending boundaries, got {ends}")
        runs = []
        for low, high in pairwise(ends):
            times = torch.linspace(high, low, self.steps + 1, dtype=torch.float64).tolist()
            runs.append(Runner(teacher, uniform(teacher, self.steps, "ddim", None, self.guidance, times)))
        return Phased(tuple(runs), self.metric.build(), self.class_dropout)


class SegmentsConfig(ObjectiveSection):
    """BOSS's straightening of the segments between these times, on stored trajectories."""

    name: Literal["segments"]
    times: list[float]
    """House times, from noise to data."""
    metric: MetricConfig = MetricConfig()
    class_dropout: float = Share

    def build(self, denoiser: Denoiser) -> Objective:
        return SegmentStraightening(tuple(self.times), self.metric.build(), self.class_dropout)


class ConsistencyConfig(ObjectiveSection):
    """Consistency distillation; the target network is the run's own average (`ema`)."""

    name: Literal["consistency"]
    teacher: str
    intervals: int = Field(default=18, ge=1)
    times: list[float] | None = None
    """Ascending house times from 0; null: `intervals` equal steps."""
    guidance: float = Field(default=1.0, ge=0)
    metric: MetricConfig = MetricConfig(name="element-huber")
    class_dropout: float = Share
    coupling: CouplingConfig = CouplingConfig()

    def build(self, denoiser: Denoiser) -> Objective:
        teacher = load_teacher(self.teacher, "objective.teacher")
        times = self.times or torch.linspace(0.0, 1.0, self.intervals + 1, dtype=torch.float64).tolist()
        return Consistency(
            teacher, tuple(times), self.guidance, self.metric.build(), self.class_dropout, self.coupling.build()
        )


class InterpolantConfig(ObjectiveSection):
    """Stochastic interpolants between two data sets (`data.opposite`), or of pairs."""

    name: Literal["interpolant"]
    time: str | dict[str, Any] = Field(default_factory=lambda: {"name": "uniform", "low": 1e-3, "high": 0.999})
    antithetic: float = Field(default=0.1, ge=0, le=0.5)
    """Distance from the ends of time below which samples are shown with both signs of their noise."""
    class_dropout: float = Share

    def build(self, denoiser: Denoiser) -> Objective:
        return InterpolantMatching(density(self.time), self.antithetic, self.class_dropout)


class EDMConfig(ObjectiveSection):
    """EDM's loss for preconditioned networks; PFGM++ on its path."""

    name: Literal["edm"]
    mean: float = -1.2
    std: float = Field(default=1.2, gt=0)
    class_dropout: float = Share

    def build(self, denoiser: Denoiser) -> Objective:
        return EDMLoss(self.mean, self.std, self.class_dropout)

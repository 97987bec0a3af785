"""Rectified Diffusion (arXiv 2410.07303): keep the path and the prediction, only train on the teacher's pairs.

What reflow straightens is not lines but predictions: those of a trained model stay constant along a trajectory, and one
DDIM step is exact whatever the schedule. Optionally ends with consistency distillation.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pliant.distillation.recipe import PairsPart, Recipe, TrainPart
from pliant.distillation.workshop import Workshop
from pliant.training.config import DataConfig
from pliant.training.flow_config import CouplingConfig, MetricConfig


class RectifiedDiffusion(Recipe):
    """Pairs, a regression on them, and perhaps a consistency stage."""

    pairs: PairsPart = PairsPart()
    train: TrainPart = TrainPart()
    space: Literal["sample", "epsilon", "velocity", "v_prediction"] = "sample"
    time: str | dict[str, Any] = "uniform"
    metric: MetricConfig = MetricConfig(name="element-huber")
    class_dropout: float = Field(default=0.0, ge=0, le=1)
    consistency: TrainPart | None = None
    intervals: int = Field(default=18, ge=1)
    """Of the consistency stage's time grid."""

    def run(self, work: Workshop) -> str:
        pairs = work.pairs("pairs", work.teacher, self.pairs)
        matching = {
            "name": "flow_matching",
            "coupling": {"name": "stored"},
            "space": self.space,
            "time": self.time,
            "metric": self.metric.model_dump(),
            "class_dropout": self.class_dropout,
        }
        model = work.train("rectified", work.teacher, work.flexible(matching), self.train, pairs)
        if self.consistency is None:
            return model
        consistent = {
            "name": "consistency",
            "teacher": model,
            "intervals": self.intervals,
            "coupling": CouplingConfig(name="stored").model_dump(),
        }
        return work.train("consistent", model, work.flexible(consistent), self.consistency, pairs)


class PhasedRectification(Recipe):
    """Its phased form: no pairs, the teacher solves each phase of noised real data. Tied to its number of phases."""

    data: DataConfig
    """Real data."""
    train: TrainPart = TrainPart()
    phases: int = Field(default=2, ge=1)
    steps: int = Field(default=5, ge=1)
    """DDIM steps of the teacher in each phase; the paper takes 10."""
    guidance: float = Field(default=1.0, ge=0)
    metric: MetricConfig = MetricConfig(name="element-huber")

    def run(self, work: Workshop) -> str:
        objective = {
            "name": "phased",
            "teacher": work.teacher,
            "phases": self.phases,
            "steps": self.steps,
            "guidance": self.guidance,
            "metric": self.metric.model_dump(),
        }
        return work.train("phased", work.teacher, work.flexible(objective), self.train, self.data.model_dump())

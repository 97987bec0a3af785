"""GET (Geng, Pokle, Kolter, NeurIPS 2023): one call of a weight-tied transformer, from pairs of a teacher."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pliant.distillation.recipe import PairsPart, Recipe, TrainPart
from pliant.distillation.workshop import Workshop
from pliant.training.flow_config import MetricConfig


class GET(Recipe):
    """A new network learns noise -> image by regression; no flow is left, so it has one step and no other."""

    student: dict[str, Any]
    """Fields of `EquilibriumConfig`; `name: T` fills in a published size."""
    pairs: PairsPart = PairsPart()
    train: TrainPart = TrainPart()
    metric: MetricConfig = MetricConfig(name="l1")
    decay: float = Field(default=0.8, gt=0, le=1)
    """Weight of an iteration's error, per iteration before the last."""

    def run(self, work: Workshop) -> str:
        pairs = work.pairs("pairs", work.teacher, self.pairs)
        objective = {"name": "equilibrium", "metric": self.metric.model_dump(), "decay": self.decay}
        model = {"equilibrium": self.student}
        return work.train("equilibrium", model, objective, self.train, pairs, prediction="sample")

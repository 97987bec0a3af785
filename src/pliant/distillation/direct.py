"""Direct distillation (Rectified Flow, arXiv 2209.03003, 2.2; InstaFlow): regress the teacher's samples in k steps.

Works as well as the pairs are learnable: those of a reflowed teacher are, those of a curved one hardly. A flexible
student may take its first steps at a coarse patch (`plan.weak_steps`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pliant.distillation.recipe import PairsPart, Recipe, TrainPart
from pliant.distillation.workshop import Workshop
from pliant.training.flow_config import MetricConfig


class Direct(Recipe):
    """Pairs of the teacher, then one training run at the times and computes of `plan`."""

    pairs: PairsPart = PairsPart()
    train: TrainPart = TrainPart()
    metric: MetricConfig = MetricConfig()
    class_dropout: float = Field(default=0.0, ge=0, le=1)
    states: Literal["chord", "own"] = "chord"
    """Of later steps: on the chord of the pair, or where the student's own earlier steps lead (twice the cost of a
    training step for two, and later steps learn to correct earlier ones)."""
    patches: str = "all"
    """all: every step is trained at all patch sizes of a flexible model; own: at what the plan says alone."""

    def run(self, work: Workshop) -> str:
        store = work.pairs("pairs", work.teacher, self.pairs)
        objective = {
            "name": "few-steps",
            "plan": self.plan.model_dump(),
            "metric": self.metric.model_dump(),
            "class_dropout": self.class_dropout,
            "states": self.states,
        }
        return work.train("distilled", work.teacher, work.flexible(objective, self.patches), self.train, store)

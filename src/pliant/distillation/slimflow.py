"""SlimFlow (arXiv 2407.12718): reflow into a smaller network by annealing, then distil it guided by its own flow."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pliant.distillation.recipe import PairsPart, Recipe, TrainPart
from pliant.distillation.workshop import Workshop
from pliant.training.flow_config import MetricConfig, PlanConfig


class SlimFlow(Recipe):
    """The student starts from nothing: the annealed coupling leads it from flow matching to reflow."""

    student: dict[str, Any] | None = None
    """Fields of the small network (as `model.dit` of `pliant train`); null: the teacher's own size and weights."""
    pairs: PairsPart = PairsPart()
    reflow: TrainPart = TrainPart()
    anneal: float = Field(default=0.6, gt=0, le=1)
    """Share of the reflow's steps over which fresh noise fades out."""
    schedule: str = "linear"
    student_pairs: PairsPart = PairsPart(plan=PlanConfig(steps=12, solver="euler"))
    """Of the annealed student, which is its own teacher in the last stage."""
    distil: TrainPart = TrainPart()
    metric: MetricConfig = MetricConfig()
    low: float = Field(default=0.2, ge=0, lt=1)
    high: float = Field(default=0.8, ge=0, lt=1)

    def run(self, work: Workshop) -> str:
        pairs = work.pairs("pairs", work.teacher, self.pairs)
        coupling = {
            "name": "annealed",
            "schedule": self.schedule,
            "steps": max(1, round(self.anneal * self.reflow.steps)),
        }
        matching = {"name": "flow_matching", "coupling": coupling, "class_dropout": 0.0}
        start = work.teacher if self.student is None else {"dit": self.student}
        patches = "all" if self.student is None else "own"
        reflowed = work.train("reflowed", start, work.flexible(matching, patches), self.reflow, pairs)
        own = work.pairs("pairs-reflowed", reflowed, self.student_pairs)
        guided = {
            "name": "flow-guided",
            "teacher": reflowed,
            "metric": self.metric.model_dump(),
            "low": self.low,
            "high": self.high,
        }
        return work.train("distilled", reflowed, work.flexible(guided, patches), self.distil, own)

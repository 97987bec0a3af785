"""Reflow (Rectified Flow, arXiv 2209.03003): train again on the pairs that the flow itself makes.

The pairs of a flow cross less than independent ones, so the flow trained on them is straighter; a few rounds and one
Euler step is nearly exact. Errors add up: at many steps a reflowed model is worse than its teacher.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pliant.distillation.recipe import PairsPart, Recipe, TrainPart
from pliant.distillation.workshop import Workshop
from pliant.training.config import DataConfig
from pliant.training.flow_config import MetricConfig, PlanConfig


class Reflow(Recipe):
    """k rounds; each starts from the weights of the one before."""

    rounds: int = Field(default=1, ge=1)
    pairs: PairsPart = PairsPart()
    online: DataConfig | None = None
    """Make pairs while training, by the frozen model of the round before, instead of storing them; for the labels of
    this data set (its images are not used)."""
    train: TrainPart = TrainPart()
    time: str | dict[str, Any] = "uniform"
    """Density of training times."""
    metric: MetricConfig = MetricConfig()
    patches: str = "all"
    """all: a flexible model trains all its patch sizes in turn; own: only its own."""
    class_dropout: float = Field(default=0.0, ge=0, le=1)
    real: DataConfig | None = None
    """Real images to mix in, inverted by the teacher (rfpp, configuration G)."""
    real_steps: int = Field(default=50, ge=1)
    """Heun steps of the inversion."""

    def run(self, work: Workshop) -> str:
        model = work.teacher
        for k in range(1, self.rounds + 1):
            model = self._round(work, model, f"round-{k}", f"pairs-{k}")
        return model

    def _round(self, work: Workshop, model: str, stage: str, store: str) -> str:
        online = {"name": "online", "teacher": model, "plan": self.pairs.plan.model_dump()}
        own = {
            "name": "flow_matching",
            "time": self.time,
            "metric": self.metric.model_dump(),
            "class_dropout": self.class_dropout,
            "coupling": online if self.online else {"name": "stored"},
        }
        objective = work.flexible(own, self.patches)
        if self.online:
            return work.train(stage, model, objective, self.train, self.online.model_dump())
        folder = work.pairs(store, model, self.pairs)
        more: list[str] = []
        if self.real is not None:
            backwards = PlanConfig(steps=self.real_steps, solver="heun")
            more.append(work.inverted(f"{store}-real", model, backwards, self.real))
        return work.train(stage, model, objective, self.train, {"source": folder, "more_pairs": more})

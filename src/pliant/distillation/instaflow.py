"""InstaFlow (arXiv 2309.06380): guided pairs, reflow on them, then direct distillation of the reflowed model.

Guidance goes into the pairs, so the student is guided in a single branch. The same stages serve class labels and texts.
"""

from __future__ import annotations

from pydantic import Field

from pliant.distillation.recipe import PairsPart, Recipe, TrainPart
from pliant.distillation.workshop import Workshop
from pliant.training.flow_config import MetricConfig, PlanConfig


class InstaFlow(Recipe):
    """Three or four stages, each with its own budget."""

    pairs: PairsPart = PairsPart(plan=PlanConfig(steps=25, solver="dpmpp-2m", guidance=1.5))
    """Of the teacher, guided."""
    reflow: TrainPart = TrainPart()
    reflowed_pairs: PairsPart = PairsPart(plan=PlanConfig(steps=25, solver="euler"))
    """Of the reflowed model; the paper guides it once more, by 1.5."""
    distil: TrainPart = TrainPart()
    perceptual: TrainPart | None = None
    """A last stage with `metric` instead of the squared error."""
    metric: MetricConfig = MetricConfig(name="perceptual")
    class_dropout: float = Field(default=0.0, ge=0, le=1)
    """While reflowing; above 0 the reflowed model can be guided."""

    def run(self, work: Workshop) -> str:
        pairs = work.pairs("pairs", work.teacher, self.pairs)
        matching = {"name": "flow_matching", "coupling": {"name": "stored"}, "class_dropout": self.class_dropout}
        reflowed = work.train("reflowed", work.teacher, work.flexible(matching), self.reflow, pairs)
        straight = work.pairs("pairs-reflowed", reflowed, self.reflowed_pairs)
        steps = {"name": "few-steps", "plan": self.plan.model_dump()}
        model = work.train("distilled", reflowed, work.flexible(steps), self.distil, straight)
        if self.perceptual is None:
            return model
        seen = {**steps, "metric": self.metric.model_dump()}
        return work.train("distilled-perceptual", model, work.flexible(seen), self.perceptual, straight)

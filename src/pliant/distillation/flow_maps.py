"""Recipes of flow maps: one training run on real data that teaches a trained flow to jump.

What they differ in is the objective and its settings (`objective` in the recipe's file, the fields of its section in
`pliant.training.flow_map_config`). The teacher is the model itself; `teacher: null` in `objective` learns from the data
alone, which is the papers' training from scratch and here a fine-tuning.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pliant.distillation.recipe import Recipe, TrainPart
from pliant.distillation.workshop import Workshop
from pliant.training.config import DataConfig


class FlowMap(Recipe):
    """Make the teacher a flow map and train it with one objective; it samples with `jump`."""

    data: DataConfig
    """Real data."""
    objective: dict[str, Any]
    """`name` and fields of the objective."""
    train: TrainPart = TrainPart()
    patches: str = "all"
    """all: a flexible model trains all its patch sizes in turn; own: only its own."""

    def run(self, work: Workshop) -> str:
        own = {"teacher": work.teacher, **self.objective}
        objective = work.flexible(own, self.patches)
        return work.train(
            "map", {"from": work.teacher, "flow_map": True}, objective, self.train, self.data.model_dump()
        )


class SegmentedMap(FlowMap):
    """TSCD: the same in stages of fewer and fewer segments, each starting from the weights of the one before."""

    segments: list[int] = Field(default=[8, 4, 2, 1], min_length=1)

    def run(self, work: Workshop) -> str:
        model: str = work.teacher
        for k, segments in enumerate(self.segments):
            own = {"teacher": work.teacher, **self.objective, "segments": segments}
            start = {"from": model, "flow_map": k == 0}
            objective = work.flexible(own, self.patches)
            model = work.train(f"segments-{segments}", start, objective, self.train, self.data.model_dump())
        return model


class Consistent(FlowMap):
    """sCM: no second time; the network's clean data becomes the sample itself."""

    def run(self, work: Workshop) -> str:
        objective = work.flexible({"teacher": work.teacher, **self.objective}, self.patches)
        return work.train("consistent", work.teacher, objective, self.train, self.data.model_dump())

"""FlowTurbo (arXiv 2409.18128): keep the flow, learn a small network that updates its last velocity.

The plan takes Heun steps, then steps with a pseudo corrector (one call each), then steps that only ask the refiner. The
model itself is untouched, so every other plan of the teacher still runs.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from pliant.distillation.recipe import Recipe, TrainPart
from pliant.distillation.workshop import Workshop
from pliant.training.config import DataConfig
from pliant.training.flow_config import PlanConfig


class FlowTurbo(Recipe):
    """Train the refiner; the result is the teacher with it."""

    data: DataConfig
    train: TrainPart = TrainPart()
    depth: int = Field(default=1, ge=1)
    """Blocks of the refiner, of the teacher's width."""
    width: int | None = Field(default=None, ge=4)
    """Another width; heads are those of the teacher."""
    longest: float = Field(default=0.12, gt=0, lt=1)
    class_dropout: float = Field(default=0.1, ge=0, le=1)
    plan: PlanConfig = PlanConfig(turbo=[1, 5, 3])

    def run(self, work: Workshop) -> str:
        from pliant.formats import load, native

        teacher = load(work.teacher)
        config = teacher.config
        network = {
            **config.to_dict(),
            "in_channels": 2 * config.in_channels,
            "depth": self.depth,
            "width": self.width or config.width,
            "learn_sigma": False,
        }
        objective = {
            "name": "refiner",
            "teacher": work.teacher,
            "longest": self.longest,
            "class_dropout": self.class_dropout,
        }
        told = {"network_time": teacher.network_time.to_config()}
        refiner = work.train("refiner", {"dit": network}, objective, self.train, self.data.model_dump(), **told)
        target = work.folder / "refined"
        native.save(replace(teacher, refiner=load(refiner)), target)
        return str(target)

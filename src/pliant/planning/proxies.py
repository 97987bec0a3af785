"""Cheap objectives: how far a plan's images, or its single steps, are from a converged teacher's.

They need few samples because both start from the same noise. What they cannot see: another image that is just as good.
The error to the all-powerful sample ranks weak-first and weak-last schedules wrongly (`pliant.planning.objective`), so
use them to choose times and coefficients at one compute, and a distributional objective between computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.planning.objective import Remembered, Score, mean_square_score
from pliant.planning.teacher import TeacherSettings, Trajectories, labels_of, teacher_trajectories
from pliant.plans import AnyPlan, Plan, Sampler, sample
from pliant.solvers import nodes_of


class _AgainstTeacher(Remembered):
    """A model, the teacher made of it, and the seeds on which plans are compared with that teacher."""

    kind: ClassVar[str]
    """In recipes."""

    def __init__(
        self, model: Denoiser, teacher: TeacherSettings | None = None, seeds: Sequence[int] = range(64)
    ) -> None:
        super().__init__()
        self.model, self.teacher, self.seeds = model, teacher or TeacherSettings(), list(seeds)
        self._labels = labels_of(model, self.seeds)

    def describe(self) -> dict[str, Any]:
        return {"objective": self.kind, "teacher": self.teacher.to_dict(), "seeds": _span(self.seeds)}


class SampleError(_AgainstTeacher):
    """Root mean square distance of the final images to a converged teacher's from the same noises.

    Also for plans with caches, stochastic solvers and anything else that samples.
    """

    kind = "sample-error"

    @property
    def name(self) -> str:
        return "error to the teacher's samples"

    @cached_property
    def targets(self) -> Tensor:
        """The teacher's images (N, C, H, W), sampled when first needed."""
        return sample(self.model, self.teacher.plan(self.model), self._labels, self.seeds, 256)

    def measure(self, plan: AnyPlan) -> Score:
        found = sample(self.model, plan, self._labels, self.seeds, 256)
        return mean_square_score((found - self.targets).double().square().flatten(1).mean(1))


class TrajectoryError(_AgainstTeacher):
    """One-step errors from the teacher's states: the root of their summed mean squares; `parts` has one per step.

    Every step starts where the teacher is at that time (multistep solvers see outputs at the teacher's states), so the
    parts say which step is bad. Errors that an earlier step makes do not travel: the sum is not the error of the image.
    """

    kind = "trajectory-error"

    @property
    def name(self) -> str:
        return "one-step error to the teacher"

    @cached_property
    def trajectories(self) -> Trajectories:
        """The teacher's, computed when first needed."""
        return teacher_trajectories(self.model, self.teacher.plan(self.model), self.seeds)

    def measure(self, plan: AnyPlan) -> Score:
        if not isinstance(plan, Plan):
            raise PlanError("one-step errors are those of one plan; measure routed plans by their samples")
        nodes = nodes_of(plan.path, plan.times)
        states = [self.trajectories.at(node) for node in nodes]
        squares = torch.zeros(len(self.seeds), dtype=torch.float64)
        parts = []
        for result in Sampler(self.model, plan).steps(self._labels, self.seeds, states[0].clone()):
            target = states[result.index + 1]
            error = (result.x - target).double().square().flatten(1).mean(1)
            squares += error
            parts.append(float(error.mean()) ** 0.5)
            with torch.no_grad():
                result.x.copy_(target)  # the interpreter's own register: the next step starts from the teacher's state
        return mean_square_score(squares, tuple(parts))


def _span(seeds: Sequence[int]) -> str:
    return f"{seeds[0]}..{seeds[-1]} ({len(seeds)})"

"""What a velocity refiner corrects along a request (FlowTurbo, arXiv 2409.18128; sheet C, 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pliant.errors import PlanError

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser
    from pliant.plans.plan import Plan
    from pliant.solvers import Program


class LastVelocity:
    """The velocity of the last full evaluation, corrected step by step. One per request.

    A refiner sees the velocity `seen` that the step came with; its first offset in a step is added to that, a second
    one (of a corrector) to the first result; the first result is what the next step comes with (the official code).
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._first: tuple[int, Tensor] | None = None

    def seen(self, step: int) -> Tensor:
        """(B, C, H, W): what the refiner is shown in this step."""
        if self._first is not None and self._first[0] != step:
            self._last, self._first = self._first[1], None
        assert self._last is not None  # the plan was checked
        return self._last

    def base(self, step: int) -> Tensor:
        """(B, C, H, W): what the refiner's answer is added to."""
        seen = self.seen(step)
        return seen if self._first is None else self._first[1]

    def keep(self, step: int, velocity: Tensor, refined: bool) -> None:
        """Remember an evaluation's (guided) result."""
        if not refined:
            self._last, self._first = velocity, None
        elif self._first is None:
            self._first = (step, velocity)


def check_refining(plan: Plan, program: Program, model: Denoiser) -> None:
    """Raise PlanError, naming the step, where a refiner is missing or has nothing to correct."""
    full = False
    for evaluation in program.evaluations:
        step = plan.steps[evaluation.step]
        if not step.compute.refine:
            full = True
            continue
        where = f"step {evaluation.step} (t={step.t:g})"
        if model.refiner is None:
            raise PlanError(f"{where} asks for a refiner, which this model has not; see pliant distill flowturbo")
        if not full:
            raise PlanError(f"{where} asks the refiner to correct a velocity before any full call computed one")
        if model.prediction != "velocity":
            raise PlanError(f"{where} refines velocities, but this model predicts {model.prediction!r}")

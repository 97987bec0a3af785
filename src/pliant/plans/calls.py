"""Which network calls a step makes, what their rows are, and whether a plan's calls find what they reuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pliant.compute import Compute
from pliant.compute.cache import Streams
from pliant.compute.sequence import PlannedCall, check_calls
from pliant.denoiser import Denoiser

if TYPE_CHECKING:
    from pliant.plans.plan import Plan, Step
    from pliant.solvers import Program


class Call(NamedTuple):
    """A compute and what the rows of its batch are, in equal shares.

    streams: "cond" (the given labels), "null" (unconditional), "weak" (the given labels, as guidance's reference).
    """

    compute: Compute
    streams: Streams


def calls_of(step: Step) -> list[Call]:
    """The network calls of one evaluation, the conditional one first; equal computes share a batch."""
    guidance = step.guidance
    if guidance is None:
        return [Call(step.compute, ("cond",))]
    reference = guidance.compute or step.compute
    if guidance.against == "weak":
        return [Call(step.compute, ("cond",)), Call(reference, ("weak",))]
    if reference == step.compute:
        return [Call(step.compute, ("cond", "null"))]
    return [Call(step.compute, ("cond",)), Call(reference, ("null",))]


def computes_of(plan: Plan) -> dict[Compute, None]:
    """Every distinct compute of a plan, in order of first use."""
    return {call.compute: None for step in plan.steps for call in calls_of(step)}


def reuses(plan: Plan) -> bool:
    """Whether some call keeps, reuses or leaves out a part of its network."""
    return not all(compute.plain for compute in computes_of(plan))


def check_reuse(plan: Plan, program: Program, model: Denoiser) -> None:
    """Raise PlanError, naming the step and the missing write, unless every call finds what it reuses."""
    planned = [
        PlannedCall(
            f"step {evaluation.step} (t={plan.steps[evaluation.step].t:g})",
            call.compute,
            call.streams,
            (model.patch_of(call.compute), model.exit_of(call.compute)),
            2 * model.shape(call.compute).depth,
        )
        for evaluation in program.evaluations
        for call in calls_of(plan.steps[evaluation.step])
    ]
    check_calls(planned)


def cache_depth(plan: Plan) -> int:
    """Values that each place of the cache must keep: the highest forecast order, plus one."""
    return 1 + max((c.reuse.order for c in computes_of(plan) if c.reuse is not None), default=0)

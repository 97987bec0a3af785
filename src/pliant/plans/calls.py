"""Which network calls a step makes, what their rows are, and whether a plan's calls find what they reuse."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

from pliant.compute import Compute
from pliant.compute.cache import Streams
from pliant.compute.sequence import PlannedCall, check_calls
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.guidance import Guidance

if TYPE_CHECKING:
    from pliant.plans.plan import Plan, Step
    from pliant.solvers import Program


class Call(NamedTuple):
    """A compute and what the rows of its batch are, in equal shares.

    streams: "cond" (the given labels), "null" (unconditional), "weak" (the given labels, as guidance's reference),
    "guide" (the given labels, seen by the model's guide, another network).
    """

    compute: Compute
    streams: Streams

    def model(self, model: Denoiser) -> Denoiser:
        """The denoiser that answers. Raises PlanError if it is a guide or a refiner and there is none."""
        if self.compute.refine:
            if model.refiner is None:
                raise PlanError("this model has no refiner; see pliant distill flowturbo")
            return model.refiner
        if self.streams != ("guide",):
            return model
        if model.guide is None:
            raise PlanError("guidance is against a guide and this model has none; see Denoiser.autoguided")
        return model.guide


def gate_memory(call: Call, model: Denoiser) -> Hashable | None:
    """Which memory the call's gate has within a request, None without a gate. The first call of each cannot reuse."""
    gate = call.compute.gate
    if gate is None:
        return None
    own, compute = call.model(model), call.compute
    return gate.memory, call.streams, own.patch_of(compute), own.exit_of(compute), compute.scale


def evaluation_calls(compute: Compute, guidance: Guidance | None) -> list[Call]:
    """The network calls of one evaluation, the conditional one first; equal computes share a batch."""
    if guidance is not None and guidance.still:
        return []
    if guidance is None or not guidance.called:
        return [Call(compute, ("cond",))]
    reference = guidance.compute or compute
    if guidance.against != "null":
        return [Call(compute, ("cond",)), Call(reference, (guidance.against,))]
    if reference == compute:
        return [Call(compute, ("cond", "null"))]
    return [Call(compute, ("cond",)), Call(reference, ("null",))]


def calls_of(step: Step) -> list[Call]:
    """The network calls of every evaluation of a step."""
    return evaluation_calls(step.compute, step.guidance)


def calls_in(plan: Plan) -> dict[Call, None]:
    """Every distinct call of a plan, in order of first use."""
    return {call: None for step in plan.steps for call in calls_of(step)}


def reuses(plan: Plan) -> bool:
    """Whether some call keeps, reuses or leaves out a part of its network."""
    return not all(call.compute.plain for call in calls_in(plan))


def check_reuse(plan: Plan, program: Program, model: Denoiser) -> None:
    """Raise PlanError, naming the step and the missing write, unless every call finds what it reuses."""
    planned = []
    for evaluation in program.evaluations:
        step = plan.steps[evaluation.step]
        for call in calls_of(step):
            own, compute = call.model(model), call.compute
            network = (own.patch_of(compute), own.exit_of(compute), compute.scale)
            label = f"step {evaluation.step} (t={step.t:g})"
            planned.append(PlannedCall(label, compute, call.streams, network, 2 * own.shape(compute).depth))
    check_calls(planned)


def check_references(plan: Plan, model: Denoiser) -> None:
    """Raise PlanError, naming the step, where guidance remembers what no earlier step computed."""
    computed = False
    for i, step in enumerate(plan.steps):
        guidance = step.guidance
        if guidance is None:
            continue
        if guidance.against in ("remembered", "difference") and not computed:
            raise PlanError(
                f"step {i} (t={step.t:g}): guidance against {guidance.against!r} needs an earlier step that computes "
                f"a reference, such as one guided against 'null'"
            )
        computed |= guidance.called


def cache_depth(plan: Plan) -> int:
    """Values that each place of the cache must keep: the highest forecast order, plus one."""
    return 1 + max((call.compute.reuse.order for call in calls_in(plan) if call.compute.reuse is not None), default=0)

"""What a run with gates or token routers really cost: the plan's price with the decisions that were taken filled in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pliant.adapters.width import DynamicDiT
from pliant.compute import MATMUL, Convention, counted_flops
from pliant.compute.cache import Decision, Streams
from pliant.denoiser import Denoiser
from pliant.plans.caching.measure import run_plan
from pliant.plans.calls import calls_in, calls_of
from pliant.plans.plan import Plan
from pliant.plans.sampling import Sampler


def spent_flops(plan: Plan, model: Denoiser, cond: Sequence[int], seeds: Sequence[int]) -> float:
    """FLOPs per image of sampling these: exact, with what gates and token routers decide while sampling.

    Of a network with routed width all matrix products that ran are counted, those of its modulations too.
    """
    if isinstance(model.network, DynamicDiT):
        return counted_flops(lambda: Sampler(model, plan)(cond, seeds)) / len(seeds)
    if all(call.compute.gate is None for call in calls_in(plan)):
        return plan.cost(model).flops
    return taken_flops(plan, model, run_plan(plan, model, cond, seeds).decisions)


def taken_flops(plan: Plan, model: Denoiser, decisions: Iterable[Decision], convention: Convention = MATMUL) -> float:
    """FLOPs per image of runs of `plan` whose gates decided this way, the mean over all their rows.

    decisions: of one run or several (`cache.decisions`). A gated call without a decision counts as full. Equal to
    `plan.cost(model).flops` for a plan without gates.
    """
    votes: dict[tuple[int, Streams], list[bool]] = {}
    for decision in decisions:
        votes.setdefault((decision.step, decision.streams), []).extend(decision.hit)
    total = 0.0
    for evaluation in plan.program(model).evaluations:
        for call in calls_of(plan.steps[evaluation.step]):
            own = call.model(model)
            once: float = own.flops(call.compute, convention, evaluation.node.t)
            hit = votes.get((evaluation.out, call.streams), [])
            if hit:
                once -= sum(hit) / len(hit) * (once - own.least_flops(call.compute, convention))
            total += len(call.streams) * once
    return total

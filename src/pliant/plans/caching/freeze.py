"""From a plan whose gates decide while sampling to one whose decisions are made: no signals, no synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pliant.compute import Compute, Pool
from pliant.compute.pooling import pool_of_hit
from pliant.compute.sites import parse_sites
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.plans.caching.measure import run_plan
from pliant.plans.calls import calls_of
from pliant.plans.plan import Plan, Step


def freeze(plan: Plan, model: Denoiser, cond: Sequence[int], seeds: Sequence[int], batch_size: int = 16) -> Plan:
    """Sample once and write down what the gates decided, step by step and stream by stream.

    A step reuses where more than half of all decisions were to reuse (rows of all samples, and evaluations if the step
    has several); on a tie it runs. If the conditional and the unconditional stream differ, they become calls of their
    own. Frozen on one sample, a plan of single-evaluation steps makes that sample's image: bit for bit, or to rounding
    where streams differ and no longer share a batch. Where a majority of many samples would reuse what no step has
    kept, the step runs. Raises PlanError for a plan without gates.
    """
    if not any(call.compute.gate is not None for step in plan.steps for call in calls_of(step)):
        raise PlanError("this plan has no gates, so there is nothing to freeze: it is static already")
    votes = _votes(plan, model, cond, seeds, batch_size)
    steps, hits = [], 0
    for i, step in enumerate(plan.steps):
        chosen = [_decided(c.compute, votes.get((i, s), [])) for c in calls_of(step) for s in c.streams]
        hits += sum(v.count(True) * 2 > len(v) for (k, _), v in votes.items() if k == i)
        steps.append(_frozen(step, chosen))
    fixed = _readable(plan.with_steps(steps), plan, model)
    provenance = {**plan.provenance, "frozen": {"samples": len(cond), "reused_calls": hits}}
    frozen = replace(fixed, provenance=provenance)
    frozen.check(model)
    return frozen


def _votes(
    plan: Plan, model: Denoiser, cond: Sequence[int], seeds: Sequence[int], batch_size: int
) -> dict[tuple[int, str], list[bool]]:
    """(step, stream) -> whether each row reused."""
    step_of = {evaluation.out: evaluation.step for evaluation in plan.program(model).evaluations}
    votes: dict[tuple[int, str], list[bool]] = {}
    for first in range(0, len(cond), batch_size):
        part = slice(first, first + batch_size)
        for decision in run_plan(plan, model, cond[part], seeds[part]).decisions:
            size = len(decision.hit) // len(decision.streams)
            for place, stream in enumerate(decision.streams):
                rows = decision.hit[place * size : (place + 1) * size]
                votes.setdefault((step_of[decision.step], stream), []).extend(rows)
    return votes


def _decided(compute: Compute, votes: Sequence[bool]) -> Compute:
    """The compute without its gate."""
    if compute.gate is None:
        return compute
    if sum(votes) * 2 > len(votes):
        tokens, hit = compute.tokens, compute.gate.on_hit
        fewer = pool_of_hit(tokens, parse_sites(hit)) if isinstance(tokens, Pool) else tokens
        return replace(compute, sites=hit, write=(), gate=None, tokens=fewer)
    reads = "C" in (compute.sites or "")
    return replace(compute, reuse=compute.reuse if reads else None, gate=None)


def _frozen(step: Step, chosen: Sequence[Compute]) -> Step:
    """chosen: the conditional call's compute and, if there is one, the reference call's."""
    if not chosen:
        return step
    guidance = step.guidance
    if guidance is not None and len(chosen) > 1:
        same = guidance.against == "null" and chosen[1] == chosen[0]
        guidance = replace(guidance, compute=None if same else chosen[1])
    return replace(step, compute=chosen[0], guidance=guidance)


def _readable(plan: Plan, gated: Plan, model: Denoiser) -> Plan:
    """The plan with every read that finds nothing replaced by the gated plan's full call."""
    kept: dict[tuple[Any, str, str], int] = {}
    steps = []
    for step, source in zip(plan.steps, gated.steps, strict=True):
        chosen = []
        originals = [c.compute for c in calls_of(source) for _ in c.streams]
        places = [(c.compute, s, c.model(model)) for c in calls_of(step) for s in c.streams]
        for (compute, stream, own), original in zip(places, originals, strict=True):
            grid = (own.patch_of(compute), own.exit_of(compute), compute.scale)
            written = original.write
            if compute != original and "C" in (compute.sites or ""):
                need = 1 if compute.reuse is None else compute.reuse.order + 1
                if min((kept.get((grid, stream, w), 0) for w in written), default=0) < need:
                    compute = _decided(original, ())
            for item in compute.write:
                kept[grid, stream, item] = kept.get((grid, stream, item), 0) + 1
            chosen.append(compute)
        steps.append(_frozen(step, chosen))
    return plan.with_steps(steps)

"""What a plan costs before anything runs: FLOPs, exactly; bytes and seconds of a batch, predicted."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pliant.compute import MATMUL, Compute, Convention
from pliant.denoiser import Denoiser
from pliant.guidance import Guidance
from pliant.plans.calls import calls_of, evaluation_calls, gate_memory

if TYPE_CHECKING:
    from pliant.plans.memory import Memory
    from pliant.plans.plan import Plan
    from pliant.plans.timing import PlanSeconds, Throughput


@dataclass(frozen=True)
class RunCost:
    """Predicted cost of running a batch with a prepared sampler."""

    images: int
    memory: Memory
    time: PlanSeconds | None
    """None without a throughput table."""

    @property
    def seconds(self) -> float | None:
        """Of the batch; at most, where gates decide."""
        return None if self.time is None else self.time.seconds

    @property
    def seconds_per_image(self) -> float | None:
        return None if self.time is None else self.time.seconds / self.images


@dataclass(frozen=True)
class PlanCost:
    """Cost of one image. A multiply-add counts 2."""

    flops: int
    full_flops: int
    """Of the same steps with every call at the model's own patch size."""
    evaluations: int
    """Solver evaluations (NFE); a guided one counts once."""
    calls: int
    """Network calls, guidance included."""
    step_flops: tuple[int, ...]
    least_flops: int
    """If every gate that may reuse does, after its first call, and every token that may skip an MLP does; equal to
    `flops` where nothing is decided while sampling."""
    batch: RunCost | None = None
    """Of a whole batch, if its size was given."""

    @property
    def share(self) -> float:
        """Fraction of the full compute, 0..1."""
        return self.flops / self.full_flops


def call_flops(
    model: Denoiser,
    compute: Compute,
    guidance: Guidance | None,
    convention: Convention = MATMUL,
    hit: bool = False,
    t: float | None = None,
) -> int:
    """FLOPs of one evaluation: the conditional call and, if guided, its reference call.

    hit: if their gates reuse and their token routers skip what they can. t: house time, for networks whose width
    depends on it.
    """
    total = 0
    for call in evaluation_calls(compute, guidance):
        own = call.model(model)
        once = own.least_flops(call.compute, convention, t) if hit else own.flops(call.compute, convention, t)
        total += len(call.streams) * once
    return total


def evaluations_per_step(plan: Plan, model: Denoiser) -> list[int]:
    """Network evaluations of every step (a last step to clean data may need fewer)."""
    counts = [0] * len(plan.steps)
    for evaluation in plan.program(model).evaluations:
        counts[evaluation.step] += 1
    return counts


def plan_cost(
    plan: Plan,
    model: Denoiser,
    convention: Convention = MATMUL,
    batch: int | None = None,
    throughput: Throughput | None = None,
) -> PlanCost:
    """The exact cost of `plan` on `model`. Raises PlanError or ConfigError if the model cannot run it.

    batch: images at once, for bytes; throughput: a table of this model and machine, for seconds (batch 1 by default).

    What gates and token routers decide is not known before: `flops` is then the most, `least_flops` the least that
    the plan can cost; `pliant.plans.caching.taken.spent_flops` measures it on samples.
    """
    plan.check(model)
    counts = evaluations_per_step(plan, model)
    full = model.flops(Compute(), convention)
    step_flops = [0] * len(plan.steps)
    saved = 0
    seen: set[Hashable] = set()
    for evaluation in plan.program(model).evaluations:
        s, t = plan.steps[evaluation.step], evaluation.node.t
        for call in calls_of(s):
            own, compute, gate = call.model(model), call.compute, call.compute.gate
            most = own.flops(compute, convention, t)
            step_flops[evaluation.step] += len(call.streams) * most
            if gate is not None:
                # The first call of all that share a memory has nothing to compare with.
                memory = gate_memory(call, model)
                first = memory not in seen
                seen.add(memory)
                if gate.never_hits or first:
                    continue
            saved += len(call.streams) * (most - own.least_flops(compute, convention, t))
    streams = [
        n * sum(len(call.streams) for call in evaluation_calls(s.compute, s.guidance))
        for n, s in zip(counts, plan.steps, strict=True)
    ]
    # Full compute: every call at the model's own patch size, and what guidance saves by not calling is not forgotten.
    whole = [n * (1 if s.guidance is None else 2) for n, s in zip(counts, plan.steps, strict=True)]
    total = sum(step_flops)
    cost = PlanCost(total, sum(whole) * full, sum(counts), sum(streams), tuple(step_flops), total - saved)
    if batch is None and throughput is None:
        return cost
    return replace(cost, batch=run_cost(plan, model, 1 if batch is None else batch, throughput))


def run_cost(plan: Plan, model: Denoiser, batch: int, throughput: Throughput | None) -> RunCost:
    """Bytes, and seconds where there is a table, of one batch. Raises PlanError for a table of another machine."""
    from pliant.plans.memory import plan_memory
    from pliant.plans.timing import Prices

    if throughput is not None:
        throughput.check(model)
    time = None if throughput is None else Prices(throughput, model, batch).plan(plan)
    return RunCost(batch, plan_memory(plan, model, batch), time)

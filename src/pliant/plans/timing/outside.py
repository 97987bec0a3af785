"""Timing what a sampler does around its network calls: with calls that answer from memory, so that little else runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from pliant.compute import Compute, Reuse
from pliant.compute.cache import Cache, Moment
from pliant.denoiser import Denoiser
from pliant.guidance import Guidance
from pliant.plans.engine import Lowered
from pliant.plans.noise import batch_noise
from pliant.plans.timing.curve import Curve
from pliant.solvers import Lin, Output, Program, run

if TYPE_CHECKING:
    from pliant.plans.plan import Plan

STEPS = 16
Watch = Callable[[Callable[[], object]], float]


def measure_outside(model: Denoiser, batches: Sequence[int], watch: Watch) -> dict[str, Curve]:
    """Curves over images of "step", "guided", "update", "term", "noise" and "begin" (see `pricing`)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for batch in batches:
        for name, seconds in _at(model, batch, watch).items():
            found.setdefault(name, []).append((float(batch), seconds))
    return {name: Curve.of(points) for name, points in found.items()}


def _at(model: Denoiser, batch: int, watch: Watch) -> dict[str, float]:
    from pliant.plans.sampling import Sampler

    labels, seeds = [i % model.num_classes for i in range(batch)], list(range(batch))
    update, term = _sums(model, batch, watch)
    first, later = _computes(model)
    plain = Sampler(model, _remembering(model, first, later, None))
    one = _out(model, first, later, batch, watch)
    step = max(_per_step(plain, labels, seeds, watch) - one - update, 0.0)
    found = {
        "step": step,
        "update": update,
        "term": term,
        "noise": watch(lambda: batch_noise(seeds, 0, model.sample_shape, model.device)),
        "begin": watch(lambda: plain.begin(labels, seeds)),
        "guided": 0.0,
    }
    if model.config.class_dropout > 0:
        guided = Sampler(model, _remembering(model, first, later, Guidance.cfg(2.0)))
        two = _out(model, first, later, 2 * batch, watch)
        found["guided"] = max(_per_step(guided, labels, seeds, watch) - two - update - step, 0.0)
    return found


def step_in_situ(
    model: Denoiser, compute: Compute, call: Curve, outside: Mapping[str, Curve], watch: Watch
) -> float:
    """Seconds that a step takes beyond its call and what `measure_outside` found, from real runs of cheap calls.

    Between network calls the processor's caches are full of the network, so that the same work around the calls takes
    longer than where nothing else runs. At most ten times as long: more is noise of the calls.
    """
    from pliant.plans.plan import Plan
    from pliant.plans.sampling import Sampler

    sampler = Sampler(model, Plan.uniform(model, STEPS, "ddim", compute))
    found = []
    for batch in (1, 4):
        labels, seeds = [i % model.num_classes for i in range(batch)], list(range(batch))
        known = call.at(batch) + outside["step"].at(batch) + outside["update"].at(batch)
        found.append(_per_step(sampler, labels, seeds, watch) - known)
    return min(max(sum(found) / len(found), 0.0), 10 * outside["step"].at(1))


def _computes(model: Denoiser) -> tuple[Compute, Compute]:
    """Of a call that keeps its output and runs no site, and of calls that answer with it."""
    sites = model.num_sites
    first = Compute(sites=f"K{sites}", write=("out",))
    return first, Compute(sites=f"C{sites}", reuse=Reuse("out"))


def _remembering(model: Denoiser, first: Compute, later: Compute, guidance: Guidance | None) -> Plan:
    from pliant.plans.plan import Plan, Step

    made = Plan.uniform(model, STEPS, "ddim", guidance=guidance)
    return made.with_steps(
        Step(s.t, s.solver, first if i == 0 else later, s.guidance) for i, s in enumerate(made.steps)
    )


def _per_step(sampler: object, labels: list[int], seeds: list[int], watch: Watch) -> float:
    """Seconds of one step after the first: between runs of all steps and of the first alone."""
    from pliant.plans.sampling import Sampler

    assert isinstance(sampler, Sampler)

    def steps(count: int) -> None:
        for _, _result in zip(range(count), sampler.steps(labels, seeds), strict=False):
            pass

    return max(watch(lambda: steps(STEPS - 1)) - watch(lambda: steps(1)), 0.0) / (STEPS - 2)


def _out(model: Denoiser, first: Compute, later: Compute, rows: int, watch: Watch) -> float:
    """Seconds of one call that answers from memory."""
    labels = torch.arange(rows, device=model.device) % model.num_classes
    x = torch.zeros(rows, *model.sample_shape, device=model.device)
    cache = Cache()
    Lowered(model, first).bind([0.5], labels, cache).call(0, x, Moment(0, 0.5, 0.0))
    bound = Lowered(model, later).bind([0.5], labels, cache)
    return watch(lambda: bound.call(0, x, Moment(1, 0.5, 0.0)))


def _sums(model: Denoiser, batch: int, watch: Watch) -> tuple[float, float]:
    """Seconds of a solver's update of two terms, and of each further term."""
    from pliant.plans.plan import Plan

    x = torch.zeros(batch, *model.sample_shape, device=model.device)
    output = Output(x, x)
    few, many = (Plan.uniform(model, STEPS, name).program(model) for name in ("ddim", "dpmpp-3m"))

    def seconds(program: Program) -> float:
        def whole() -> None:
            for _ in run(program, x, lambda state, evaluation: output):
                pass

        return watch(whole)

    short, long = seconds(few), seconds(many)
    (a, b), (c, d) = _counts(few), _counts(many)
    term = max((long / c - short / a) / (d / c - b / a), 0.0) if d / c > b / a else 0.0
    return max(short / a - term * (b / a - 2), 0.0), term


def _counts(program: Program) -> tuple[int, int]:
    """Sums of a program, and all their terms."""
    sums = [op for op in program.instructions() if isinstance(op, Lin)]
    return len(sums), sum(len(op.x) + len(op.m) + len(op.z) for op in sums)



"""Timing what a sampler does around its network calls: with calls that answer from memory, each after a full one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pliant.compute import Compute, Reuse
from pliant.denoiser import Denoiser
from pliant.guidance import Guidance
from pliant.plans.engine import Weights
from pliant.plans.noise import batch_noise
from pliant.plans.plan import Plan
from pliant.plans.timing.curve import Curve
from pliant.plans.timing.stepping import FEW, SLOW, STEPS, Stopwatch, cycled, in_turns, steady
from pliant.solvers import Lin, Output, Program, run


def measure_outside(model: Denoiser, batches: Sequence[int], long: float, watch: Stopwatch) -> dict[str, Curve]:
    """Curves over images of "step", "guided", "update", "term", "noise" and "begin" (see `pricing`).

    long: seconds; batches whose steps would take longer are not measured.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    weights, slowest = Weights(), 0.0
    for batch in batches:
        if found and slowest * batch > long:
            continue
        slowest = watch.steps(cycled(model, [Compute()], 2, weights), batch)[-1] / batch
        for name, seconds in _at(model, batch, weights, slowest * batch > SLOW, watch).items():
            found.setdefault(name, []).append((float(batch), seconds))
    return {name: Curve.of(points) for name, points in found.items()}


def _at(model: Denoiser, batch: int, weights: Weights, slow: bool, watch: Stopwatch) -> dict[str, float]:
    labels, seeds = [i % model.num_classes for i in range(batch)], list(range(batch))
    sites, steps = model.num_sites, FEW if slow else STEPS
    cycle = [Compute(write=("out",)), Compute(sites=f"C{sites}", reuse=Reuse("out"))]
    samplers = {"plain": cycled(model, cycle, steps, weights)}
    if model.config.class_dropout > 0:
        samplers["guided"] = cycled(model, cycle, steps, weights, Guidance.cfg(2.0))
    taken = {name: steady(found, 2) for name, found in in_turns(samplers, batch, watch, slow).items()}
    update, term = _sums(model, batch, watch)
    return {
        "step": max(taken["plain"] - update, 0.0),
        "guided": max(taken["guided"] - taken["plain"], 0.0) if "guided" in taken else 0.0,
        "update": update,
        "term": term,
        "noise": watch(lambda: batch_noise(seeds, 0, model.sample_shape, model.device)),
        "begin": watch(lambda: samplers["plain"].begin(labels, seeds)),
    }


def _sums(model: Denoiser, batch: int, watch: Stopwatch) -> tuple[float, float]:
    """Seconds of a solver's update of two terms, and of each further term."""
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

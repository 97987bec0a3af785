"""Timing what a sampler does around its network calls: with calls that answer from memory, each after a full one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

import torch

from pliant.compute import Compute, Reuse
from pliant.denoiser import Denoiser
from pliant.guidance import Guidance
from pliant.plans.engine import Weights
from pliant.plans.noise import batch_noise
from pliant.plans.plan import Plan
from pliant.plans.timing.curve import Curve
from pliant.plans.timing.stepping import FEW, SLOW, STEPS, Stopwatch, Turns, cycled, steady
from pliant.solvers import Lin, Output, Program, run


class Outside:
    """What happens around the calls of a model, timed in passes."""

    def __init__(self, model: Denoiser, batches: Sequence[int], long: float, watch: Stopwatch) -> None:
        """long: seconds; batches whose steps would take longer are not measured."""
        self.model, self.watch = model, watch
        self.turns: dict[int, Turns] = {}
        self.hot: dict[int, list[dict[str, float]]] = {}
        weights, each = Weights(), 0.0
        for batch in batches:
            if self.turns and each * batch > long:
                continue
            each = watch.steps(cycled(model, [Compute()], 2, weights), batch)[-1] / batch
            steps = FEW if each * batch > SLOW else STEPS
            samplers = {"plain": cycled(model, self._cycle(), steps, weights)}
            if model.config.class_dropout > 0:
                samplers["guided"] = cycled(model, self._cycle(), steps, weights, Guidance.cfg(2.0))
            self.turns[batch], self.hot[batch] = Turns(samplers, batch, watch), []

    def _cycle(self) -> list[Compute]:
        """A full call, and one that answers with what that one kept."""
        return [Compute(write=("out",)), Compute(sites=f"C{self.model.num_sites}", reuse=Reuse("out"))]

    def go(self) -> None:
        """A pass."""
        model = self.model
        for batch, turns in self.turns.items():
            turns.go()
            labels, seeds = [i % model.num_classes for i in range(batch)], list(range(batch))
            update, term = _sums(model, batch, self.watch)
            self.hot[batch].append({
                "update": update,
                "term": term,
                "noise": self.watch(partial(batch_noise, seeds, 0, model.sample_shape, model.device)),
                "begin": self.watch(partial(turns.samplers["plain"].begin, labels, seeds)),
            })  # fmt: skip

    def curves(self) -> dict[str, Curve]:
        """Curves over images of "step", "guided", "update", "term", "noise" and "begin" (see `pricing`)."""
        points: dict[str, list[tuple[float, float]]] = {}
        for batch, turns in self.turns.items():
            taken = {name: steady(steps, 2) for name, steps in turns.medians().items()}
            found = {unit: statistics.median(h[unit] for h in self.hot[batch]) for unit in self.hot[batch][0]}
            found["step"] = max(taken["plain"] - found["update"], 0.0)
            found["guided"] = max(taken["guided"] - taken["plain"], 0.0) if "guided" in taken else 0.0
            for unit, seconds in found.items():
                points.setdefault(unit, []).append((float(batch), seconds))
        return {unit: Curve.of(found) for unit, found in points.items()}


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

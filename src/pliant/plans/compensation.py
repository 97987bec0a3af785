"""Fitting DC-Solver's compensation ratios to a fine trajectory (arXiv 2409.03755; sheet D, 3).

One number per step, found step after step: the ratio whose state at the end of the step lies nearest to where a teacher
with many steps is at that time, starting from the same noises. Each trial costs one network call, since earlier calls
do not depend on the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from pliant.errors import PlanError, ShapeError
from pliant.paths import Path, PredictionType
from pliant.solvers import Eval, Evaluate, SolverLike, compile_program, run
from pliant.solvers.interpreter import NetworkOutput
from pliant.solvers.unipc import DCSolver

_GOLDEN = 0.5 * (math.sqrt(5.0) - 1.0)


@dataclass(frozen=True)
class Compensation:
    """The fitted solver, and the mean squared distance to the teacher after every step: without and with its ratios."""

    solver: DCSolver
    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        return self.solver.ratios


def teacher_states(
    path: Path,
    times: Sequence[float] | Tensor,
    evaluate: Evaluate,
    x: Tensor,
    stored: PredictionType,
    steps: int = 200,
    solver: SolverLike = "ddim",
    mu: Tensor | None = None,
) -> list[Tensor]:
    """States at `times[1:]` of a fine trajectory from `x` at `times[0]`: every interval in equal parts, `steps` in all.

    (The published search looks up the nearest stored time; here the teacher stops at every time exactly.)
    """
    grid = torch.as_tensor(times, dtype=torch.float64).tolist()
    parts = max(1, math.ceil(steps / max(1, len(grid) - 1)))
    fine = [a + (b - a) * k / parts for a, b in pairwise(grid) for k in range(parts)] + grid[-1:]
    program = compile_program(path, fine, solver, stored)
    results = run(program, x, evaluate, mu=mu)
    return [result.x for result in results if (result.index + 1) % parts == 0]


@torch.no_grad()
def fit_compensation(
    path: Path,
    times: Sequence[float] | Tensor,
    evaluate: Evaluate,
    x: Tensor,
    targets: Sequence[Tensor],
    stored: PredictionType,
    solver: DCSolver | None = None,
    width: float = 1.0,
    trials: int = 24,
    mu: Tensor | None = None,
) -> Compensation:
    """Ratios for `solver` (default: `dc-solver`) on `times`, one step after the other, each kept before the next.

    x: start states (B, ...), ten are enough; targets: where the teacher is after every step (`teacher_states`).
    width: ratios are sought in 1 +- width. trials: per step, each one network call on the batch. A ratio that does not
    beat 1 stays 1, and so do the first `degree` steps, which have no history to combine.
    Raises PlanError for a wrong number of targets, ShapeError if they are not shaped like x.
    """
    steps = len(times) - 1
    if len(targets) != steps:
        raise PlanError(f"{steps} steps need {steps} targets, one state after every step, got {len(targets)}")
    for k, target in enumerate(targets):
        if target.shape != x.shape:
            raise ShapeError(f"target {k} has shape {tuple(target.shape)}, the start states {tuple(x.shape)}")
    if not width > 0.0 or trials < 3:
        raise PlanError(f"a search needs width > 0 and at least 3 trials, got {width} and {trials}")
    start = DCSolver() if solver is None else solver
    plain = replace(start, ratios=())
    ratios = [1.0] * steps
    known: dict[int, NetworkOutput] = {}

    def distances(chosen: Sequence[float], until: int) -> list[float]:
        """Squared distances after steps 0..until; calls up to `until` are remembered."""

        def cached(state: Tensor, op: Eval) -> NetworkOutput:
            if op.out > until:
                return evaluate(state, op)
            if op.out not in known:
                known[op.out] = evaluate(state, op)
            return known[op.out]

        program = compile_program(path, times, replace(start, ratios=tuple(chosen)), stored)
        found = []
        for result in run(program, x, cached, mu=mu):
            found.append(float((result.x.double() - targets[result.index].double()).square().mean()))
            if result.index == until:
                break
        return found

    for i in range(start.degree, steps):

        def distance(ratio: float, i: int = i) -> float:
            return distances([*ratios[:i], ratio], i)[i]

        ratio, value = _minimum(distance, 1.0 - width, 1.0 + width, trials)
        if value < distance(1.0):
            ratios[i] = ratio
    after = distances(ratios, steps - 1)
    known.clear()
    return Compensation(replace(plain, ratios=tuple(ratios)), tuple(distances([], steps - 1)), tuple(after))


def _minimum(f: Callable[[float], float], low: float, high: float, trials: int) -> tuple[float, float]:
    """(place, value) of the least of `trials` values: a coarse scan, then golden sections around its best place."""
    scan = max(3, trials // 3)
    places = [low + (high - low) * k / (scan - 1) for k in range(scan)]
    values = [f(p) for p in places]
    best = min(range(scan), key=values.__getitem__)
    best_seen = (values[best], places[best])
    low, high = places[max(best - 1, 0)], places[min(best + 1, scan - 1)]
    a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    fa, fb = f(a), f(b)
    for _ in range(trials - scan - 2):
        best_seen = min(best_seen, (fa, a), (fb, b))
        if fa < fb:
            high, b, fb = b, a, fa
            a = high - _GOLDEN * (high - low)
            fa = f(a)
        else:
            low, a, fa = a, b, fb
            b = low + _GOLDEN * (high - low)
            fb = f(b)
    value, place = min(best_seen, (fa, a), (fb, b))
    return place, value

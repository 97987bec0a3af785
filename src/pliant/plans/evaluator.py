"""One sampling run's network calls: what the interpreter asks for at every evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pliant.compute import Cache, Compute, Moment
from pliant.denoiser import Denoiser
from pliant.guidance import guide
from pliant.plans.calls import Call, cache_depth, calls_of
from pliant.plans.engine import BoundCalls, Lowered, packed_pair
from pliant.plans.plan import Plan
from pliant.solvers import Eval, Output, Program


class Evaluator:
    """Picks the calls of an evaluation's step, runs and combines them. One per request: it owns the cache."""

    def __init__(
        self, model: Denoiser, plan: Plan, program: Program, lowered: Mapping[Compute, Lowered], labels: Tensor
    ) -> None:
        self.plan = plan
        self.cache = Cache(cache_depth(plan))
        self.calls = [calls_of(step) for step in plan.steps]
        self.wanted: dict[Call, list[float]] = {}
        self.position: dict[tuple[int, Call], int] = {}
        for evaluation in program.evaluations:
            for call in self.calls[evaluation.step]:
                times = self.wanted.setdefault(call, [])
                self.position[evaluation.out, call] = len(times)
                times.append(evaluation.node.t)
        null = torch.full_like(labels, model.num_classes)
        rows = {"cond": labels, "null": null, "weak": labels}
        self.bound: dict[Call, BoundCalls] = {}
        for call, times in self.wanted.items():
            here = torch.cat([rows[s] for s in call.streams])
            self.bound[call] = lowered[call.compute].bind(times, here, self.cache, call.streams)

    def __call__(self, x: Tensor, evaluation: Eval) -> Output:
        step = self.plan.steps[evaluation.step]
        calls = self.calls[evaluation.step]
        answers = self._answers(x, calls, evaluation)
        if step.guidance is None:
            return Output(*answers[0])
        if len(answers) == 1:  # conditional and null ran as one batch
            (values, variances), n = answers[0], len(x)
            conditional, reference = values[:n], values[n:]
            variance = None if variances is None else variances[:n]
        else:
            (conditional, variance), (reference, _) = answers
        return Output(guide(conditional, reference, step.guidance.scale, step.guidance.channels), variance)

    def _answers(self, x: Tensor, calls: list[Call], evaluation: Eval) -> list[tuple[Tensor, Tensor | None]]:
        """(value, variance) of every call; a batch of two streams has twice the rows."""
        places = [self.position[evaluation.out, call] for call in calls]
        if len(calls) == 2:
            packed = packed_pair(self.bound[calls[0]], self.bound[calls[1]], places[0], places[1], x)
            if packed is not None:
                return packed
        moment = Moment(evaluation.out, evaluation.node.t, evaluation.node.log_snr)
        return [
            self.bound[call].call(k, x if len(call.streams) == 1 else torch.cat([x] * len(call.streams)), moment)
            for call, k in zip(calls, places, strict=True)
        ]

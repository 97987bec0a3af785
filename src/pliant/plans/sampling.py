"""The sampling loop. A generator underneath: previews, progress bars, streaming and interruption need nothing more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.guidance import guide
from pliant.plans.engine import BoundCalls, Lowered, packed_pair
from pliant.plans.noise import batch_noise, check_seeds
from pliant.plans.plan import Plan, Step
from pliant.solvers import Eval, Output, Program, StepResult, run

Call = tuple[Compute, str]
"""A compute and which labels it sees: "cond", "null", or "both" (conditional and null in one batch)."""


def check_labels(cond: Sequence[int] | Tensor, model: Denoiser) -> Tensor:
    """(B,) int64 labels on the model's device. Raises PlanError for a class the model does not have."""
    labels = torch.as_tensor(cond, dtype=torch.int64).reshape(-1).to(model.device)
    top = model.num_classes if model.config.class_dropout > 0 else model.num_classes - 1
    bad = [int(v) for v in labels if not 0 <= int(v) <= top]
    if bad:
        null = f" ({model.num_classes} is the unconditional class)" if top == model.num_classes else ""
        raise PlanError(f"class {bad[0]} does not exist: this model has classes 0 to {model.num_classes - 1}{null}")
    if len(labels) == 0:
        raise PlanError("there is nothing to sample: give at least one class label")
    return labels


class Sampler:
    """A model and a plan made ready once, to be run on any number of batches."""

    def __init__(self, model: Denoiser, plan: Plan) -> None:
        """Checks the plan against the model and lowers every distinct compute. Raises PlanError naming the step."""
        plan.check(model)
        self.model = model
        self.plan = plan
        self.program: Program = plan.program(model)
        computes = {s.compute for s in plan.steps}
        computes |= {s.guidance.compute for s in plan.steps if s.guidance and s.guidance.compute}
        self.lowered = {c: Lowered(model, c) for c in computes}

    def steps(
        self, cond: Sequence[int] | Tensor, seeds: Sequence[int], x: Tensor | None = None
    ) -> Iterator[StepResult]:
        """Run the plan, yielding after each step its index, state `x` and the `x0` estimate (both (B, C, H, W)).

        cond: class labels; seeds: one per sample; x: start state instead of seeded noise, (B, C, H, W).
        """
        model = self.model
        labels = check_labels(cond, model)
        seeds = check_seeds(seeds, len(labels))
        if x is None:
            start = self.program.start
            # For data of unit variance this is the path's own spread at the start: 1 on variance-preserving paths.
            scale = (start.alpha**2 + start.sigma**2) ** 0.5
            x = batch_noise(seeds, -1, model.sample_shape, model.device, model.path) * scale
        elif tuple(x.shape) != (len(labels), *model.sample_shape):
            raise PlanError(f"the start state must be {(len(labels), *model.sample_shape)}, got {tuple(x.shape)}")
        evaluate = _Evaluator(self, labels)
        noise = lambda slot: batch_noise(seeds, slot, model.sample_shape, model.device)  # noqa: E731
        results = run(self.program, x.to(model.device), evaluate, noise)
        while True:
            with torch.no_grad():  # not around the yield: the caller's own code keeps its grad mode
                result = next(results, None)
            if result is None:
                return
            yield result

    def __call__(self, cond: Sequence[int] | Tensor, seeds: Sequence[int], x: Tensor | None = None) -> Tensor:
        """The final state (B, C, H, W)."""
        final = x
        for result in self.steps(cond, seeds, x):
            final = result.x
        if final is None:  # a plan has at least one step
            raise PlanError("this plan has no steps")
        return final


class _Evaluator:
    """What the interpreter calls: picks the calls of an evaluation's step, runs and combines them."""

    def __init__(self, sampler: Sampler, labels: Tensor) -> None:
        self.plan = sampler.plan
        self.labels = labels
        self.wanted: dict[Call, list[float]] = {}
        self.position: dict[tuple[int, Call], int] = {}
        for evaluation in sampler.program.evaluations:
            for call in _calls(self.plan.steps[evaluation.step]):
                times = self.wanted.setdefault(call, [])
                self.position[evaluation.out, call] = len(times)
                times.append(evaluation.node.t)
        null = torch.full_like(labels, sampler.model.num_classes)
        which = {"cond": labels, "null": null, "both": torch.cat([labels, null])}
        self.bound: dict[Call, BoundCalls] = {
            call: sampler.lowered[call[0]].bind(times, which[call[1]]) for call, times in self.wanted.items()
        }

    def __call__(self, x: Tensor, evaluation: Eval) -> Output:
        step = self.plan.steps[evaluation.step]
        calls = _calls(step)
        answers = self._answers(x, calls, [self.position[evaluation.out, call] for call in calls])
        if step.guidance is None:
            return Output(*answers[0])
        if len(answers) == 1:  # conditional and null ran as one batch
            (values, variances), n = answers[0], len(x)
            conditional, reference = values[:n], values[n:]
            variance = None if variances is None else variances[:n]
        else:
            (conditional, variance), (reference, _) = answers
        return Output(guide(conditional, reference, step.guidance.scale, step.guidance.channels), variance)


    def _answers(self, x: Tensor, calls: list[Call], places: list[int]) -> list[tuple[Tensor, Tensor | None]]:
        """(value, variance) of every call; a batch of both labels has twice the rows."""
        if len(calls) == 2:
            packed = packed_pair(self.bound[calls[0]], self.bound[calls[1]], places[0], places[1], x)
            if packed is not None:
                return packed
        return [
            self.bound[call].call(k, torch.cat([x, x]) if call[1] == "both" else x)
            for call, k in zip(calls, places, strict=True)
        ]


def _calls(step: Step) -> list[Call]:
    """The network calls of one evaluation, the conditional one first; equal computes share a batch."""
    guidance = step.guidance
    if guidance is None:
        return [(step.compute, "cond")]
    reference = guidance.compute or step.compute
    if guidance.against == "weak":
        return [(step.compute, "cond"), (reference, "cond")]
    if reference == step.compute:
        return [(step.compute, "both")]
    return [(step.compute, "cond"), (reference, "null")]


def sample_steps(
    model: Denoiser,
    plan: Plan,
    cond: Sequence[int] | Tensor,
    seeds: Sequence[int] | None = None,
    x: Tensor | None = None,
) -> Iterator[StepResult]:
    """Sample step by step: yields (index, x, x0) objects. `seeds` default to 0, 1, 2, ..."""
    return Sampler(model, plan).steps(cond, _default_seeds(cond, seeds), x)


def sample(
    model: Denoiser,
    plan: Plan,
    cond: Sequence[int] | Tensor,
    seeds: Sequence[int] | None = None,
    batch_size: int = 64,
    x: Tensor | None = None,
) -> Tensor:
    """Sample all labels, `batch_size` at a time -> (B, C, H, W). Image k depends on its own label and seed only."""
    seeds = _default_seeds(cond, seeds)
    sampler = Sampler(model, plan)
    labels = check_labels(cond, model)
    check_seeds(seeds, len(labels))
    parts = [
        sampler(labels[i : i + batch_size], seeds[i : i + batch_size], None if x is None else x[i : i + batch_size])
        for i in range(0, len(labels), batch_size)
    ]
    return torch.cat(parts)


def _default_seeds(cond: Sequence[int] | Tensor, seeds: Sequence[int] | None) -> Sequence[int]:
    return list(range(len(cond))) if seeds is None else seeds

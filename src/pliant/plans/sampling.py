"""The sampling loop. A generator underneath: previews, progress bars, streaming and interruption need nothing more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.plans.calls import calls_in
from pliant.plans.engine import Lowered, Weights
from pliant.plans.evaluator import Evaluator
from pliant.plans.noise import batch_noise, check_seeds, start_state
from pliant.plans.plan import Plan
from pliant.plans.routed import AnyPlan, RoutedPlans
from pliant.solvers import Noise, Program, StepResult, run
from pliant.solvers.interpreter import Combine, combine


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


def check_offset(program: Program, mu: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """`mu` on the device. Raises PlanError if the program's path needs it and it is missing, or the reverse."""
    needed = program.needs_offset or program.start.beta != 0.0
    if mu is None:
        if needed:
            raise PlanError(
                f"the path {program.path['name']!r} drifts to a known image: pass mu=, a tensor {shape} (for image "
                f"restoration, the degraded images)"
            )
        return None
    if not needed:
        raise PlanError(f"mu is for paths with an offset, which {program.path['name']!r} has not; leave it out")
    if tuple(mu.shape) != shape or not mu.is_floating_point():
        raise PlanError(f"mu must be a floating-point tensor {shape}, got {mu.dtype} {tuple(mu.shape)}")
    return mu.to(device)


@dataclass(frozen=True, eq=False)
class Begun:
    """One request, ready to run: its network calls with all they will remember, start state, noise and offset."""

    evaluate: Evaluator
    x: Tensor
    noise: Noise
    mu: Tensor | None


class Sampler:
    """A model and a plan made ready once, to be run on any number of batches."""

    def __init__(self, model: Denoiser, plan: Plan, add: Combine = combine, weights: Weights | None = None) -> None:
        """Checks the plan against the model and lowers every distinct compute. Raises PlanError naming the step.

        add: how states are updated; `pliant.solvers.fused_combine` compiles that to one pass, for large states.
        weights: of other samplers of this model, whose networks are used instead of making them again.
        """
        self.add = add
        plan.check(model)
        self.model = model
        self.plan = plan
        self.program: Program = plan.program(model)
        weights = weights or Weights()
        self.lowered = {
            call: Lowered(call.model(model), call.compute, weights.of(*call))
            for call in calls_in(plan)
        }

    def steps(
        self,
        cond: Sequence[int] | Tensor,
        seeds: Sequence[int],
        x: Tensor | None = None,
        mu: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> Iterator[StepResult]:
        """Run the plan, yielding after each step its index, state `x` and the `x0` estimate (both (B, C, H, W)).

        cond: class labels; seeds: one per sample; x: start state instead of seeded noise, (B, C, H, W); mu: the images
        that a path with an offset drifts to (the degraded ones of restoration), (B, C, H, W), for such paths only;
        origin: clean images (B, C, H, W) for guidance against "origin".
        """
        request = self.begin(cond, seeds, x, mu, origin)
        results = run(self.program, request.x, request.evaluate, request.noise, request.mu, self.add)
        while True:
            with torch.no_grad():  # not around the yield: the caller's own code keeps its grad mode
                result = next(results, None)
            if result is None:
                return
            yield result

    def begin(
        self,
        cond: Sequence[int] | Tensor,
        seeds: Sequence[int],
        x: Tensor | None = None,
        mu: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> Begun:
        """A request checked and made ready, before its first network call. Arguments as those of `steps`."""
        model = self.model
        labels = check_labels(cond, model)
        seeds = check_seeds(seeds, len(labels))
        mu = check_offset(self.program, mu, (len(labels), *model.sample_shape), model.device)
        if x is None:
            x = start_state(self.program.start, seeds, model.sample_shape, model.device, model.path, mu)
        elif tuple(x.shape) != (len(labels), *model.sample_shape):
            raise PlanError(f"the start state must be {(len(labels), *model.sample_shape)}, got {tuple(x.shape)}")
        if origin is not None and origin.shape != x.shape:
            raise PlanError(f"origin must be images of the states' shape {tuple(x.shape)}, got {tuple(origin.shape)}")
        evaluate = Evaluator(model, self.plan, self.program, self.lowered, labels, origin)
        noise = lambda slot: batch_noise(seeds, slot, model.sample_shape, model.device)  # noqa: E731
        return Begun(evaluate, x.to(model.device), noise, mu)

    def __call__(
        self,
        cond: Sequence[int] | Tensor,
        seeds: Sequence[int],
        x: Tensor | None = None,
        mu: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> Tensor:
        """The final state (B, C, H, W)."""
        final = x
        for result in self.steps(cond, seeds, x, mu, origin):
            final = result.x
        if final is None:  # a plan has at least one step
            raise PlanError("this plan has no steps")
        return final


def sample_steps(
    model: Denoiser,
    plan: Plan,
    cond: Sequence[int] | Tensor,
    seeds: Sequence[int] | None = None,
    x: Tensor | None = None,
    mu: Tensor | None = None,
    origin: Tensor | None = None,
    size: Sequence[int] | None = None,
    extrapolation: str | None = None,
) -> Iterator[StepResult]:
    """Sample step by step: yields (index, x, x0) objects. `seeds` default to 0, 1, 2, ...; x, mu: `Sampler.steps`;
    size, extrapolation: `sample`."""
    return Sampler(sized(model, size, extrapolation), plan).steps(cond, _default_seeds(cond, seeds), x, mu, origin)


def sample(
    model: Denoiser,
    plan: AnyPlan,
    cond: Sequence[int] | Tensor,
    seeds: Sequence[int] | None = None,
    batch_size: int = 64,
    x: Tensor | None = None,
    mu: Tensor | None = None,
    origin: Tensor | None = None,
    size: Sequence[int] | None = None,
    extrapolation: str | None = None,
) -> Tensor:
    """Sample all labels, `batch_size` at a time -> (B, C, H, W). Image k depends on its own label and seed only.

    plan: of several `RoutedPlans` each sample takes its own, in batches of samples with the same one.
    size, extrapolation: of the states, for networks for any size; see `Denoiser.at_size`.
    x, mu, origin: start states, the images that a path with an offset drifts to, and those that guidance leads away
    from; see `Sampler.steps`.
    """
    seeds = _default_seeds(cond, seeds)
    model = sized(model, size, extrapolation)
    if isinstance(plan, RoutedPlans):
        return RoutedSampler(model, plan)(cond, seeds, x, mu, origin, batch_size)
    sampler = Sampler(model, plan)
    labels = check_labels(cond, model)
    check_seeds(seeds, len(labels))
    check_offset(sampler.program, mu, (len(labels), *model.sample_shape), model.device)
    parts = []
    for i in range(0, len(labels), batch_size):
        part = slice(i, i + batch_size)
        states, offsets, origins = (None if v is None else v[part] for v in (x, mu, origin))
        parts.append(sampler(labels[part], seeds[part], states, offsets, origins))
    return torch.cat(parts)


class RoutedSampler:
    """A model and routed plans made ready once: every sample takes its own plan, and comes back where it was asked for.

    Raises PlanError as `Sampler` does, and for classes without a plan.
    """

    def __init__(self, model: Denoiser, plan: RoutedPlans) -> None:
        plan.check(model)
        self.model, self.plan = model, plan
        self._samplers = [Sampler(model, p) for p in plan.plans]

    def __call__(
        self,
        cond: Sequence[int] | Tensor,
        seeds: Sequence[int],
        x: Tensor | None = None,
        mu: Tensor | None = None,
        origin: Tensor | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """(B, C, H, W); arguments as those of `Sampler.steps`. batch_size: at most so many of one plan at once."""
        labels = check_labels(cond, self.model)
        seeds = check_seeds(seeds, len(labels))
        parts, places = [], []
        for number, group in self.plan.groups(labels, seeds):
            size = batch_size or len(group)
            for some in (group[i : i + size] for i in range(0, len(group), size)):
                given = (None if v is None else v[some] for v in (x, mu, origin))
                parts.append(self._samplers[number](labels[some], [seeds[i] for i in some], *given))
                places += some
        return torch.cat(parts)[torch.tensor(places).argsort()]


def sized(model: Denoiser, size: Sequence[int] | None, extrapolation: str | None) -> Denoiser:
    """The model at a size, if one is asked for."""
    if size is None and extrapolation is None:
        return model
    return model.at_size(model.sample_size if size is None else size, extrapolation)


def _default_seeds(cond: Sequence[int] | Tensor, seeds: Sequence[int] | None) -> Sequence[int]:
    return list(range(len(cond))) if seeds is None else seeds

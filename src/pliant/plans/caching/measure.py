"""What goes through a network's sites while a plan without caching runs: for rules that are calibrated on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pliant.compute.cache import Cache
from pliant.compute.executor import take_rows
from pliant.compute.sites import SiteModel, State
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.plans.calls import Call
from pliant.plans.evaluator import Evaluator
from pliant.plans.noise import batch_noise, check_seeds, start_state
from pliant.plans.plan import Plan
from pliant.plans.sampling import Sampler, check_labels
from pliant.solvers import Eval, run


class Calibration(NamedTuple):
    """What was measured: options of the preset, and facts about the measurement. All JSON-ready."""

    options: dict[str, Any]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """The first evaluation of a step, conditional stream: the network as sites, its tokens and its modulations."""

    step: int
    sites: SiteModel
    start: State
    """Before the first site, (B, N, D) each."""
    context: Any
    grid: Any = None
    """What its tokens are: patch size, exit and scale. Steps of different ones cannot be compared."""

    def end(self) -> State:
        """After the last site."""
        return self.sites.run(0, len(self.sites.sites), self.start, self.context)


class _Watcher(Evaluator):
    """An evaluator that shows each evaluation's conditional call before it runs."""

    show: Callable[[Eval, SiteModel, State, Any], None]

    def _answers(self, x: Tensor, calls: list[Call], evaluation: Eval) -> list[tuple[Tensor, Tensor | None]]:
        call = calls[0]
        bound, k = self.bound[call], self.position[evaluation.out, call]
        if bound.lowered.plain is None or bound.table is None:
            raise PlanError("calibration needs merged adapters and a network without LayerNorms")
        sites = bound.lowered.plain.site_model(bound.lowered.denoiser.sample_size)
        total = len(x) * len(call.streams)
        rows = take_rows(bound.table.rows(k), torch.arange(len(x)), total)
        start, context = sites.begin(bound.scaled(k, x), rows)
        self.show(evaluation, sites, start, context)
        return super()._answers(x, calls, evaluation)


def run_plan(
    plan: Plan,
    model: Denoiser,
    cond: Sequence[int],
    seeds: Sequence[int],
    show: Callable[[Eval, SiteModel, State, Any], None] | None = None,
) -> Cache:
    """Sample once; the request's cache, with the gates' decisions. show: sees every evaluation's conditional call."""
    sampler = Sampler(model, plan)
    labels = check_labels(cond, model)
    values = check_seeds(seeds, len(labels))
    if sampler.program.needs_offset:
        raise PlanError("plans on paths with an offset cannot be calibrated or frozen here: they need known images")
    x = start_state(sampler.program.start, values, model.sample_shape, model.device, model.path)
    evaluate = (Evaluator if show is None else _Watcher)(model, plan, sampler.program, sampler.lowered, labels)
    if isinstance(evaluate, _Watcher) and show is not None:
        evaluate.show = show
    noise = lambda slot: batch_noise(values, slot, model.sample_shape, model.device)  # noqa: E731
    with torch.no_grad():
        for _ in run(sampler.program, x, evaluate, noise):
            pass
    return evaluate.cache


def watch(plan: Plan, model: Denoiser, cond: Sequence[int], seeds: Sequence[int]) -> list[Seen]:
    """Every step's first evaluation of a plan without caching. Keeps the tokens of all steps in memory."""
    found: dict[int, Seen] = {}

    def keep(evaluation: Eval, sites: SiteModel, start: State, context: Any) -> None:
        compute = plan.steps[evaluation.step].compute
        grid = model.patch_of(compute), model.exit_of(compute), compute.scale
        found.setdefault(evaluation.step, Seen(evaluation.step, sites, start, context, grid))

    run_plan(plan, model, cond, seeds, keep)
    return [found[i] for i in sorted(found)]


@torch.no_grad()
def residuals(plan: Plan, model: Denoiser, cond: Sequence[int], seeds: Sequence[int]) -> Iterator[tuple[Seen, Tensor]]:
    """Every step that calls the network, and (B, N, D) what all sites together add to the tokens."""
    for seen in watch(plan, model, cond, seeds):
        yield seen, seen.end()[0] - seen.start[0]

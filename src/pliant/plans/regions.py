"""Token subsets and merging where a plan meets a model: what can run, and what a step's calls leave for the next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pliant.adapters.low_band import coarse_config
from pliant.adapters.token_router import TokenRoutedDiT
from pliant.compute import Merge, Pool, Subset
from pliant.compute.pooling import check_grid
from pliant.compute.subset import Regions
from pliant.compute.tokens import Tokens
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.models.patches import patch_pair
from pliant.plans.calls import Call, calls_of
from pliant.solvers import Eval, Output, Program

if TYPE_CHECKING:
    from pliant.plans.plan import Plan


def regional(tokens: Tokens | None) -> bool:
    """Whether a call computes the active tokens only and leaves the others their last prediction."""
    return isinstance(tokens, Subset) and tokens.rule != "router"


def check_tokens(calls: Sequence[Call], model: Denoiser) -> None:
    """Raise PlanError unless a step's calls (the conditional one first) can have the tokens that they ask for."""
    for call in calls:
        own, tokens = call.model(model), call.compute.tokens
        if tokens is None:
            continue
        scale = call.compute.scale
        config = own.dit_config if scale is None else coarse_config(own.dit_config, scale)
        grid = config.grid(patch_pair(own.patch_of(call.compute)))
        if isinstance(tokens, Pool):
            check_grid(tokens, grid)
        elif isinstance(tokens, Merge):
            if min(grid) < tokens.window:
                raise PlanError(
                    f"merging needs windows of {tokens.window}x{tokens.window}, this call has only "
                    f"{grid[0]}x{grid[1]} tokens"
                )
        elif isinstance(tokens, Subset) and tokens.rule == "update_std" and own.config.in_channels < 2:
            raise PlanError("tokens are chosen by 'update_std', but one channel has no spread; use 'update_norm'")
        elif isinstance(tokens, Subset) and tokens.rule == "router":
            if not isinstance(own.network, TokenRoutedDiT):
                raise PlanError("tokens are chosen by 'router', but this model has no token routers; see route_tokens")
            if own.patch_of(call.compute) != own.config.patch_size:
                raise PlanError("token routers are for the model's own patch size; leave out patch")
        if regional(tokens) and scale is not None:
            raise PlanError("a subset of tokens is chosen on the state's own grid; leave out the scale")
        if regional(tokens) and tokens != calls[0].compute.tokens:
            raise PlanError("guidance's reference asks for another subset of tokens than the conditional call")


class RegionKeeper:
    """Completes one request's predictions and chooses the tokens of its next evaluation. State is in `regions`.

    Only the network's output is patched, so any solver works; one that evaluates several times per step has its tokens
    chosen anew before each evaluation, from the one before. The choice reads the guided prediction `F` itself: RAS
    reads the update `(t_next - t) F`, whose factor ranks no token before another.
    """

    def __init__(self, regions: Regions, plan: Plan, program: Program, model: Denoiser) -> None:
        self.regions = regions
        computes = {e.out: plan.steps[e.step].compute for e in program.evaluations if calls_of(plan.steps[e.step])}
        self.subsets = {out: c.tokens for out, c in computes.items() if isinstance(c.tokens, Subset)}
        self.subsets = {out: subset for out, subset in self.subsets.items() if regional(subset)}
        self.patches = {out: model.patch_of(computes[out]) for out in self.subsets}
        order = sorted(computes)
        self.following = dict(pairwise(order))

    def answers(
        self, calls: Sequence[Call], answers: Sequence[tuple[Tensor, Tensor | None]], evaluation: Eval
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Every stream's prediction with all of its pixels: guidance rules may look at whole images."""
        partial = evaluation.out in self.subsets
        found = []
        for call, (value, variance) in zip(calls, answers, strict=True):
            values = [
                self.regions.complete(stream, part, partial and regional(call.compute.tokens))
                for stream, part in zip(call.streams, value.chunk(len(call.streams)), strict=True)
            ]
            found.append((values[0] if len(values) == 1 else torch.cat(values), variance))
        return found

    def finish(self, output: Output, evaluation: Eval) -> Output:
        """The guided prediction as the solver sees it; then the choice for the next evaluation."""
        partial = evaluation.out in self.subsets
        variance = output.variance
        value = self.regions.complete("guided", output.value, partial)
        if variance is not None:
            variance = self.regions.complete("variance", variance, partial)
        following = self.following.get(evaluation.out)
        if following in self.subsets:
            self.regions.choose(value, self.subsets[following], patch_pair(self.patches[following]))
        return Output(value, variance)

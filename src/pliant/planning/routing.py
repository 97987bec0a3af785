"""Which ready plan a condition needs: quality predicted per plan, traded against cost (CATImage; AdaDiff).

Cost-aware routing (arXiv 2506.14753; sheet E): the best rule under a mean cost is `argmax_m q_m(y) - lambda c_m`, and
the multiplier lambda follows from the budget. q is estimated by regression from measured quality. AdaDiff (arXiv
2311.14768; sheet D, 8) trains a policy by its gradient instead. Actions are any plans of one model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.plans import Plan, RoutedPlans, sample


class Estimator(Protocol):
    """Features (N, F) -> predicted quality of every plan (N, M)."""

    def __call__(self, features: Tensor) -> Tensor: ...


def _checked(features: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or quality.ndim != 2 or len(features) != len(quality) or len(features) == 0:
        raise PlanError(
            f"routing learns from features (N, F) and quality (N, plans), got {tuple(features.shape)} and "
            f"{tuple(quality.shape)}"
        )
    if not bool(features.isfinite().all() and quality.isfinite().all()):
        raise PlanError("routing needs finite features and qualities; leave out samples that failed")
    return features.double(), quality.double()


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Mean measured quality of the k nearest training conditions."""

    features: Tensor
    quality: Tensor
    k: int

    @staticmethod
    def fit(features: Tensor, quality: Tensor, k: int = 50) -> Neighbours:
        """features: (N, F); quality: (N, M), mean over seeds if there are several."""
        return Neighbours(*_checked(features, quality), min(k, len(features)))

    def __call__(self, features: Tensor) -> Tensor:
        near = torch.cdist(features.double(), self.features).topk(self.k, largest=False).indices
        return self.quality[near].mean(1)


@dataclass(frozen=True, eq=False)
class Head:
    """A small network trained by squared error, one output per plan."""

    network: nn.Module
    mean: Tensor
    spread: Tensor

    @staticmethod
    def fit(features: Tensor, quality: Tensor, width: int = 32, updates: int = 400, seed: int = 0) -> Head:
        x, y = _checked(features, quality)
        mean, spread = y.mean(0), y.std(0).nan_to_num(0.0) + 1e-6
        network = _network(x.shape[1], width, y.shape[1], seed)
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-2, weight_decay=1e-4)
        target = ((y - mean) / spread).float()
        for _ in range(updates):
            optimiser.zero_grad()
            (network(x.float()) - target).square().mean().backward()
            optimiser.step()
        return Head(network, mean, spread)

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        return self.network(features.float()).double() * self.spread + self.mean


def _network(features: int, width: int, out: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, out))


@dataclass(frozen=True, eq=False)
class Router:
    """Plans of one model, what each costs, and what each is predicted to be worth."""

    plans: tuple[Plan, ...]
    costs: Tensor
    """(M,), in any unit, e.g. FLOPs of `plan.cost`."""
    estimate: Estimator

    def decide(self, features: Tensor, price: float) -> Tensor:
        """(N,) plan numbers: the most quality minus price times cost; of equals the cheapest. price: lambda >= 0."""
        if not price >= 0.0:
            raise PlanError(f"the price of cost is {price:g}; expected a number of at least 0")
        order = self.costs.argsort(stable=True)
        gain = (self.estimate(features) - price * self.costs)[:, order]
        best = gain.max(1, keepdim=True).values
        first = (gain >= best - 1e-12).double().argmax(1)
        return order[first]

    def price_for(self, features: Tensor, budget: float) -> float:
        """The least price at which these conditions cost at most `budget` on average, by bisection.

        Raises PlanError if even the cheapest plan costs more, saying what it costs.
        """
        least = float(self.costs.min())
        if budget < least:
            raise PlanError(f"a mean cost of {budget:g} is below the cheapest plan, which costs {least:g}")

        def cost(price: float) -> float:
            return float(self.costs[self.decide(features, price)].mean())

        if cost(0.0) <= budget:
            return 0.0
        low, high = 0.0, 1.0 / least
        while cost(high) > budget:
            high *= 2.0
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if cost(middle) > budget else (low, middle)
        return high

    def by_class(self, classes: Tensor, budget: float) -> RoutedPlans:
        """What `pliant.sample` runs: one plan per class. classes: (C, F) features of the classes, in order."""
        chosen = self.decide(classes, self.price_for(classes, budget))
        return RoutedPlans(self.plans, tuple(chosen.tolist()))

    def by_features(self, features: Callable[[Tensor, Sequence[int]], Tensor], price: float) -> RoutedPlans:
        """One plan per sample, from features (B, F) of labels and seeds, such as an embedding, or the start noise."""
        return RoutedPlans(self.plans, choose=lambda labels, seeds: self.decide(features(labels, seeds), price))


def measured_quality(
    model: Denoiser,
    plans: Sequence[Plan],
    labels: Sequence[int],
    seeds: Sequence[int],
    score: Callable[[Tensor, Tensor], Tensor],
    batch: int = 256,
) -> Tensor:
    """(N, M): the score of every plan's image of every sample, from the same noise. score: (images, labels) -> (B,)."""
    wanted = torch.as_tensor(list(labels))
    return torch.stack([score(sample(model, p, labels, seeds, batch), wanted).double() for p in plans], 1)


def class_means(quality: Tensor, labels: Sequence[int], num_classes: int, shrink: float = 4.0) -> Tensor:
    """(C, M): mean quality per class, drawn towards the mean of all by `shrink` samples' weight.

    Few samples make the best of noisy means look better than it is (sheet E's pitfall); shrinking counters that.
    """
    which = torch.as_tensor(list(labels))
    overall = quality.mean(0)
    rows = []
    for c in range(num_classes):
        own = quality[which == c]
        rows.append((own.sum(0) + shrink * overall) / (len(own) + shrink))
    return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class PlanPolicy:
    """AdaDiff's policy: softmax over plans from a condition's features, trained by policy gradient."""

    network: nn.Module

    @staticmethod
    def fit(
        features: Tensor,
        quality: Tensor,
        costs: Tensor,
        gamma: float = 0.5,
        kappa: float = 0.95,
        updates: int = 500,
        entropy: float = 0.01,
        seed: int = 0,
    ) -> PlanPolicy:
        """features: (N, F); quality: (N, M) of every plan, positive; costs: (M,).

        Reward of plan a (sheet D, 8): Q_a / Q_max - gamma c_a / c_max where Q_a >= kappa Q_max, else -1; Q_max is the
        dearest plan's quality. The greedy action's reward is the baseline (self-critical), entropy is rewarded by
        `entropy`.
        """
        x, q = _checked(features, quality)
        dearest = int(costs.argmax())
        relative = q / q[:, dearest : dearest + 1]
        reward = torch.where(relative >= kappa, relative - gamma * costs / costs.max(), -1.0).float()
        network = _network(x.shape[1], 32, q.shape[1], seed)
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.arange(len(x))
        for _ in range(updates):
            logits = network(x.float()).log_softmax(1)
            action = torch.multinomial(logits.exp(), 1, generator=generator).squeeze(1)
            advantage = reward[rows, action] - reward[rows, logits.argmax(1)]
            bonus = -(logits.exp() * logits).sum(1)
            loss = -(advantage * logits[rows, action] + entropy * bonus).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return PlanPolicy(network)

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """(N, M)."""
        found: Tensor = self.network(features.float()).softmax(1)
        return found

    def by_class(self, plans: Sequence[Plan], classes: Tensor) -> RoutedPlans:
        """The most probable plan of every class."""
        return RoutedPlans(tuple(plans), tuple(self.probabilities(classes).argmax(1).tolist()))

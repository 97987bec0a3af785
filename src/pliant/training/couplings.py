"""Which source belongs to which sample: the pairs (x0, x1) that a path is drawn between.

A coupling is `coupling(batch, path, draws) -> (x0, x1)`: data at t = 0 and source (usually noise) at t = 1. Regression
on any of them gives a flow between the same ends; the coupling decides how much its trajectories cross, so how few
steps sampling needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from pliant.errors import ConfigError
from pliant.training.draws import Draws

if TYPE_CHECKING:
    from pliant.paths import Path
    from pliant.training.models import Runner
    from pliant.training.objectives.base import Batch


class Ends(NamedTuple):
    """Both (B, C, H, W)."""

    x0: Tensor
    x1: Tensor


class Coupling(Protocol):
    def __call__(self, batch: Batch, path: Path, draws: Draws) -> Ends: ...


@dataclass(frozen=True)
class Independent:
    """Data and fresh noise of the path's own law."""

    def __call__(self, batch: Batch, path: Path, draws: Draws) -> Ends:
        return Ends(batch.images, draws.noise(path, batch.images.shape[1:]))


@dataclass(frozen=True)
class Stored:
    """The pairs of the data: (noise, sample) of a teacher, or samples of two data sets."""

    def __call__(self, batch: Batch, path: Path, draws: Draws) -> Ends:
        return Ends(batch.images, stored_sources(batch))


def stored_sources(batch: Batch) -> Tensor:
    """(B, C, H, W). Raises ConfigError for data without pairs."""
    if batch.sources is None:
        raise ConfigError("this coupling needs pairs: let data.source be a folder of pairs, or set data.opposite")
    return batch.sources


Anneal: TypeAlias = Literal["linear", "cosine", "exponential"]


@dataclass(frozen=True)
class Annealed:
    """SlimFlow's (arXiv 2407.12718): stored pairs whose noise is mixed with fresh noise, ever less of it.

    `z_b = sqrt(1-b^2) z + b z'` stays N(0, I); b falls from 1 (plain flow matching) to 0 (plain reflow) over `steps`.
    """

    steps: int
    schedule: Anneal = "linear"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"annealing takes at least 1 step, got {self.steps}")

    def __call__(self, batch: Batch, path: Path, draws: Draws) -> Ends:
        b = anneal(draws.step, self.steps, self.schedule)
        fresh = draws.noise(path, batch.images.shape[1:])
        return Ends(batch.images, blended(stored_sources(batch), fresh, b))


def anneal(step: int, steps: int, schedule: Anneal = "linear") -> float:
    """b of optimizer step `step`: 1 at 0. "linear" and "cosine" are 0 from `steps` on, "exponential" is 1/e there."""
    share = min(1.0, step / steps)
    if schedule == "linear":
        return 1.0 - share
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * share))
    return math.exp(-step / steps)


def blended(noise: Tensor, fresh: Tensor, b: float) -> Tensor:
    """`sqrt(1-b^2) noise + b fresh`: of unit variance, with correlation sqrt(1-b^2) to `noise`."""
    return math.sqrt(1.0 - b * b) * noise + b * fresh


@dataclass(frozen=True)
class OptimalTransport:
    """Minibatch optimal transport (arXiv 2302.00482): noise re-paired within the batch so that total squared
    distance is least.

    Within classes: pairing across classes would make the noise depend on the label, which sampling does not know. Every
    process pairs its own micro-batch, so here, unlike elsewhere, the number of processes changes the result.
    solver: "scipy" (exact assignment) or "pot" (the package POT's exact plan).
    """

    solver: Literal["scipy", "pot"] = "scipy"
    within_classes: bool = True

    def __call__(self, batch: Batch, path: Path, draws: Draws) -> Ends:
        noise = draws.noise(path, batch.images.shape[1:])
        labels = batch.labels if self.within_classes else torch.zeros_like(batch.labels)
        order = torch.empty(len(batch), dtype=torch.int64)
        for label in labels.unique():
            rows = (labels == label).nonzero()[:, 0].cpu()
            order[rows] = rows[assignment(batch.images[rows], noise[rows], self.solver)]
        return Ends(batch.images, noise[order.to(noise.device)])


def assignment(x0: Tensor, x1: Tensor, solver: Literal["scipy", "pot"] = "scipy") -> Tensor:
    """(n,) indices p that minimise `sum_i |x0_i - x1_p(i)|^2`, for (n, ...) and (n, ...)."""
    cost = torch.cdist(x0.flatten(1).double(), x1.flatten(1).double()).square().cpu().numpy()
    if solver == "pot":
        try:
            import ot
        except ImportError:
            raise ConfigError("optimal transport with 'pot' needs POT: pip install POT; or use 'scipy'") from None
        plan = ot.emd(ot.unif(len(cost)), ot.unif(len(cost)), cost)
        return torch.from_numpy(plan).argmax(1)
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ConfigError("optimal transport needs scipy: pip install scipy") from None
    return torch.from_numpy(linear_sum_assignment(cost)[1])


@dataclass(frozen=True)
class Online:
    """Pairs made while training: fresh noise, and where the frozen teacher's plan takes it (online reflow)."""

    run: Runner

    def __call__(self, batch: Batch, path: Path, draws: Draws) -> Ends:
        noise = draws.noise(path, batch.images.shape[1:])
        return Ends(self.run(batch.labels, noise * self.run.start_scale), noise)

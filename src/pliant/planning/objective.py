"""What a plan is worth: one interface for cheap proxies and for distances between distributions.

A score is a number with an interval, lower is better. Objectives are deterministic: the same plan, seeds and settings
give the same score, and a plan is measured once (`Plan.digest`).

Which one to trust. A proxy (the error to a converged teacher) is cheap and sharp, but it asks for the teacher's own
image, and ranks schedules that are weak first against those that are weak last wrongly. On the digits (12 steps, 8 of
them weak, guidance 1.5) it is .081 against .118, while the Fréchet distance is .80 against .67. Planners may search
times and coefficients by proxy; between computes, and in the end (`confirm`), a distribution decides.

A distance to data also judges the guidance itself: on the digits it is .13 without guidance and .8 at 1.5 (12 steps, 8
weak). A planner that may leave guidance out and is told to lower that distance will do so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from pliant.plans import AnyPlan

LEVEL = 0.9
"""Probability that the intervals of scores cover."""


@dataclass(frozen=True)
class Score:
    """Lower is better; low..high is a 90 % interval (by which samples were drawn)."""

    value: float
    low: float
    high: float
    samples: int = 0
    """Images or trajectories it was measured on."""
    parts: tuple[float, ...] = ()
    """What it is made of, such as one error per step; may be empty."""

    def overlaps(self, other: Score) -> bool:
        """Whether the two intervals meet."""
        return self.low <= other.high and other.low <= self.high

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "parts": list(self.parts)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Score:
        return Score(**{**data, "parts": tuple(data.get("parts", ()))})

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@runtime_checkable
class Objective(Protocol):
    """A measure of plans for one model."""

    @property
    def name(self) -> str:
        """What the number may be called, e.g. "Fréchet distance (digits-classifier)"."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts for recipes: teacher, seeds, extractor, reference, ..."""
        ...

    def __call__(self, plan: AnyPlan) -> Score:
        """Lower is better; the same plan always gets the same score. Raises PlanError if the plan cannot run."""
        ...


class Remembered(ABC):
    """Base of objectives: measures every plan once. `measured` counts the plans that had to be run."""

    def __init__(self) -> None:
        self._known: dict[str, Score] = {}
        self.measured = 0

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def describe(self) -> dict[str, Any]: ...

    @abstractmethod
    def measure(self, plan: AnyPlan) -> Score:
        """The score, computed."""

    def __call__(self, plan: AnyPlan) -> Score:
        key = plan.digest()
        if key not in self._known:
            self._known[key] = self.measure(plan)
            self.measured += 1
        return self._known[key]


def normal_reach(level: float = LEVEL) -> float:
    """Standard deviations that a normal law keeps within with this probability, 1.645 for 0.9."""
    return float(torch.special.ndtri(torch.tensor((1.0 + level) / 2.0, dtype=torch.float64)))


def mean_square_score(squares: torch.Tensor, parts: tuple[float, ...] = ()) -> Score:
    """Root of the mean of per-sample mean squares (N,), with the interval of that mean."""
    squares = squares.to(torch.float64)
    n = len(squares)
    mean = float(squares.mean())
    error = float(squares.std()) / n**0.5 if n > 1 else 0.0
    reach = normal_reach() * error
    return Score(mean**0.5, max(0.0, mean - reach) ** 0.5, (mean + reach) ** 0.5, n, parts)

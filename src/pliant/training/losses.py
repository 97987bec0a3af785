"""How far a prediction is from its target: squared error, pseudo-Huber, and perceptual distances.

A metric takes a `Compared` and gives one number per sample, (B,). Anything but the squared error is legitimate only
where the target is a function of the network's input, as for pairs of a deterministic flow: for independent couplings
its minimiser is not the conditional mean (sheet C, 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from pliant.errors import ConfigError
from pliant.paths import like


@dataclass(frozen=True)
class Compared:
    """A prediction and what it should have been, in the space the objective regresses in, and as clean data."""

    value: Tensor
    """(B, ...)."""
    target: Tensor
    t: Tensor
    """House times, (B,) float64."""
    sample: Callable[[], Tensor]
    """The clean data that the prediction says, (B, C, H, W); computed only if a metric looks."""
    clean: Tensor
    """The clean data of the target."""


class Metric(Protocol):
    """Compared -> (B,) non-negative numbers."""

    def __call__(self, c: Compared) -> Tensor: ...


@dataclass(frozen=True)
class SquaredError:
    """Mean over elements of the squared difference."""

    def __call__(self, c: Compared) -> Tensor:
        return (c.value.float() - c.target).square().flatten(1).mean(1)


@dataclass(frozen=True)
class AbsoluteError:
    """Mean over elements of the absolute difference (GET)."""

    def __call__(self, c: Compared) -> Tensor:
        return (c.value.float() - c.target).abs().flatten(1).mean(1)


@dataclass(frozen=True)
class PseudoHuber:
    """`(sqrt(||e||^2 + c^2) - c)/d` with `c = c_per_element * d` over the d elements of a sample (arXiv 2405.20320).

    `||e||^2/(2 c d)` for small errors, `||e||/d` for large ones. d is the number of elements, as in the paper's code.
    """

    c_per_element: float = 0.00054

    def __post_init__(self) -> None:
        _positive(self.c_per_element, "c_per_element")

    def __call__(self, c: Compared) -> Tensor:
        return pseudo_huber(c.value.float() - c.target, self.c_per_element)


def pseudo_huber(error: Tensor, c_per_element: float) -> Tensor:
    """(B, ...) -> (B,); see `PseudoHuber`."""
    flat = error.flatten(1)
    d = flat.shape[1]
    c = c_per_element * d
    # |e|^2 / (sqrt(|e|^2 + c^2) + c): the same number without cancellation where the error is small.
    square = flat.square().sum(1)
    return square / (torch.sqrt(square + c * c) + c) / d


@dataclass(frozen=True)
class ElementHuber:
    """Mean over elements of `sqrt(e^2 + c^2) - c` (Rectified Diffusion, arXiv 2410.07303: c = 0.001)."""

    c: float = 0.001

    def __post_init__(self) -> None:
        _positive(self.c, "c")

    def __call__(self, c: Compared) -> Tensor:
        square = (c.value.float() - c.target).square().flatten(1)
        return (square / (torch.sqrt(square + self.c**2) + self.c)).mean(1)


PerceptualDistance: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Two batches of images (B, C, H, W) in [-1, 1] -> (B,), differentiable."""


@dataclass(frozen=True)
class Perceptual:
    """A perceptual distance between the clean data of prediction and target (InstaFlow, SlimFlow: distillation)."""

    distance: PerceptualDistance

    def __call__(self, c: Compared) -> Tensor:
        return self.distance(c.sample().float(), c.clean)


@dataclass(frozen=True)
class PerceptualHuber:
    """rfpp's loss (arXiv 2405.20320): `(1-t) huber + perceptual * w`, w = 1 (config E) or 1/t (config F)."""

    distance: PerceptualDistance
    c_per_element: float = 0.00054
    weight: Literal["1", "1/t"] = "1/t"

    def __call__(self, c: Compared) -> Tensor:
        huber = pseudo_huber(c.value.float() - c.target, self.c_per_element)
        t = c.t.to(huber)
        seen = self.distance(c.sample().float(), c.clean)
        return (1.0 - t) * huber + (seen if self.weight == "1" else seen / t)


@dataclass(frozen=True)
class Sum:
    """Several metrics added."""

    parts: tuple[Metric, ...]

    def __call__(self, c: Compared) -> Tensor:
        total = self.parts[0](c)
        for part in self.parts[1:]:
            total = total + part(c)
        return total


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Mean over a batch of (B,) values times (B,) weights."""
    return (values * like(weights, values)).mean()


def _positive(value: float, name: str) -> None:
    if value <= 0.0:
        raise ConfigError(f"{name} of a Huber loss must be positive, got {value}")

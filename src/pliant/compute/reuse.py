"""Reusing what earlier calls computed: which values, and how they are forecast to the present moment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from pliant.errors import ConfigError, suggest

ReuseKind = Literal["branch", "span", "out"]
Basis = Literal["newton", "taylor"]
Clock = Literal["step", "time", "logsnr"]
MAX_ORDER = 3


@dataclass(frozen=True)
class Reuse:
    """What the letter C means in a call's sites.

    kind "branch": each site's output before its gate (gates and modulation stay those of now); "span": the change of
    the state over every run of C (old gates included); "out": the whole network's output (all sites are C).
    order 0 repeats the newest value, order q extrapolates the newest q+1 of them on the clock `on`.
    """

    kind: ReuseKind = "branch"
    order: int = 0
    basis: Basis = "newton"
    """newton: exact on polynomials up to the order, at uneven times. taylor: TaylorSeer's published form, which is
    exact for linear features only."""
    on: Clock = "step"

    def __post_init__(self) -> None:
        choices = {"kind": get_args(ReuseKind), "basis": get_args(Basis), "on": get_args(Clock)}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"reuse has {name} {value!r}; {suggest(str(value), known)}")
        if not isinstance(self.order, int) or not 0 <= self.order <= MAX_ORDER:
            raise ConfigError(f"reuse has order {self.order!r}; forecasts of order 0 to {MAX_ORDER} exist")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Reuse:
        """Inverse of `to_dict`. Raises ConfigError for unknown fields."""
        try:
            return Reuse(**values)
        except TypeError:
            raise ConfigError(f"reuse takes kind, order, basis, on; got {', '.join(map(str, values))}") from None

    def describe(self) -> str:
        """e.g. `span, order 1`."""
        words: str = self.kind
        if self.order:
            words += f", order {self.order}"
            words += "" if self.basis == "newton" else f" {self.basis}"
            words += "" if self.on == "step" else f" in {self.on}"
        return words


def forecast_weights(at: float, nodes: Sequence[float], basis: Basis = "newton") -> tuple[float, ...]:
    """Weights w with `f(at) ~ sum_j w_j f(nodes_j)`; nodes newest first, as many as the order plus one.

    Newton's form is the polynomial through all nodes. Taylor's form uses recursive backward differences, each divided
    by the newest gap, as if they were derivatives at the newest node (TaylorSeer, arXiv 2503.06923).
    """
    if basis == "newton":
        return tuple(
            math.prod((at - other) / (here - other) for k, other in enumerate(nodes) if k != j)
            for j, here in enumerate(nodes)
        )
    weights = [0.0] * len(nodes)
    # Row j of `difference`: the weights of the j-th backward difference at the newest node.
    table = [[float(i == j) for i in range(len(nodes))] for j in range(len(nodes))]
    factor = 1.0
    for order in range(len(nodes)):
        for i, value in enumerate(table[0]):
            weights[i] += factor * value
        # The published recursion divides difference k of each update by that update's own gap to the one before.
        table = [
            [(a - b) / (nodes[j] - nodes[j + 1]) for a, b in zip(table[j], table[j + 1], strict=True)]
            for j in range(len(table) - 1)
        ]
        factor *= (at - nodes[0]) / (order + 1)
    return tuple(weights)

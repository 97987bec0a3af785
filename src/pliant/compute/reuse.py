"""Reusing what earlier calls computed: which values, and how they are forecast to the present moment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from pliant.compute.chebyshev import Chebyshev, chebyshev_weights
from pliant.compute.numbers import is_whole
from pliant.errors import ConfigError, suggest

ReuseKind = Literal["branch", "increment", "span", "out", "drift", "state"]
WHOLE: tuple[str, ...] = ("out", "drift", "state")
"""Kinds that stand for the whole network: all sites are C."""
Basis = Literal["newton", "taylor", "chebyshev"]
Clock = Literal["step", "time", "logsnr"]
MAX_ORDER = 3
"""Of polynomials through the kept values."""
MAX_WINDOW = 128
"""Values that a regression may keep."""


def branch_slot(rank: int | None) -> str:
    """What a kept branch is called, in a cache and in a compute's `write`; rank: of its correction, None: of none."""
    return "branch" if rank is None else f"increment({rank})"


@dataclass(frozen=True)
class Reuse:
    """What the letter C means in a call's sites.

    kind "branch": each site's output before its gate (gates and modulation stay those of now); "span": the change of
    the state over every run of C (old gates included); "increment": branches whose every linear layer (queries, keys
    and values each for themselves) adds a product of rank `rank` with the change of its input since then. The others
    stand for the whole network (all sites are C): "out" is its output, "drift" output minus input (added to the input
    of now), "state" what its head reads.
    order 0 repeats the newest value, order q forecasts from the newest q+1 of them on the clock `on`.
    """

    kind: ReuseKind = "branch"
    order: int = 0
    basis: Basis = "newton"
    """newton: exact on polynomials up to the order, at uneven times. taylor: TaylorSeer's published form, which is
    exact for linear features only. chebyshev: ridge regression, see `fit`."""
    on: Clock = "step"
    fit: Chebyshev | None = None
    """Of the basis "chebyshev", and of no other."""
    rank: int | None = None
    """Of the kind "increment", and of no other; a layer whose two factors would cost more than its matrix is computed
    as it is, 0 is plain reuse."""

    def __post_init__(self) -> None:
        choices = {"kind": get_args(ReuseKind), "basis": get_args(Basis), "on": get_args(Clock)}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"reuse has {name} {value!r}; {suggest(str(value), known)}")
        most = MAX_WINDOW - 1 if self.basis == "chebyshev" else MAX_ORDER
        if not is_whole(self.order) or not 0 <= self.order <= most:
            raise ConfigError(f"reuse has order {self.order!r}; forecasts of order 0 to {most} exist")
        if (self.fit is not None) != (self.basis == "chebyshev"):
            raise ConfigError("reuse takes a fit with the basis 'chebyshev', and only with it")
        if self.basis == "chebyshev" and self.on != "step":
            raise ConfigError(f"reuse with the basis 'chebyshev' runs on the clock 'step', not {self.on!r}")
        if (self.rank is not None) != (self.kind == "increment"):
            raise ConfigError("reuse takes a rank with the kind 'increment', and only with it")
        if self.rank is not None and (not is_whole(self.rank) or self.rank < 0 or self.order):
            raise ConfigError(f"reuse has rank {self.rank!r} and order {self.order}; expected a rank >= 0, order 0")

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k not in ("fit", "rank") or v is not None}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Reuse:
        """Inverse of `to_dict`. Raises ConfigError for unknown fields."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"reuse is {values!r}; expected an object like {{\"kind\": \"branch\"}}")
        fit = values.get("fit")
        try:
            fitted = None if fit is None else Chebyshev(**fit)
        except TypeError:
            known = ", ".join(f.name for f in fields(Chebyshev))
            raise ConfigError(f"reuse has fit {fit!r}; expected an object with {known}") from None
        try:
            return Reuse(**{**values, "fit": fitted})
        except TypeError:
            raise ConfigError(
                f"reuse takes {', '.join(f.name for f in fields(Reuse))}; got {', '.join(map(str, values))}"
            ) from None

    def describe(self) -> str:
        """e.g. `span, order 1`."""
        words: str = self.kind if self.rank is None else f"{self.kind} of rank {self.rank}"
        if self.order:
            words += f", order {self.order}"
            words += "" if self.basis == "newton" else f" {self.basis}"
            words += "" if self.on == "step" else f" in {self.on}"
        return words


def forecast_weights(
    at: float, nodes: Sequence[float], basis: Basis = "newton", fit: Chebyshev | None = None
) -> tuple[float, ...]:
    """Weights w with `f(at) ~ sum_j w_j f(nodes_j)`; nodes newest first, as many as the order plus one.

    Newton's form is the polynomial through all nodes. Taylor's form uses recursive backward differences, each divided
    by the newest gap, as if they were derivatives at the newest node (TaylorSeer, arXiv 2503.06923). chebyshev: `fit`.
    Clocks of time and log-SNR have nodes that polynomials cannot tell apart, such as the end of a Heun step and the
    start of the next: the newest of them counts. Nor can they use one at an infinite log-SNR (pure noise, clean data):
    it has no weight, as in the limit. A forecast for such a moment is the newest value.
    """
    usable = _usable(nodes)
    if math.isinf(at):
        usable = usable[:1]
    if len(usable) < len(nodes) and fit is None:
        few = forecast_weights(at, [nodes[j] for j in usable], basis) if len(usable) > 1 else (1.0,)
        weights = [0.0] * len(nodes)
        for j, weight in zip(usable, few, strict=True):
            weights[j] = weight
        return tuple(weights)
    if fit is not None:
        return chebyshev_weights(at, nodes, fit, _polynomial(at, nodes[:3]))
    if basis == "newton":
        return _polynomial(at, nodes)
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


def _usable(nodes: Sequence[float]) -> list[int]:
    """Which nodes are distinct and finite, newest first; where none is finite the newest."""
    found: list[int] = []
    for j, node in enumerate(nodes):
        if math.isfinite(node) and all(node != nodes[k] for k in found):
            found.append(j)
    return found or [0]


def _polynomial(at: float, nodes: Sequence[float]) -> tuple[float, ...]:
    """Of the polynomial through all nodes."""
    return tuple(
        math.prod((at - other) / (here - other) for k, other in enumerate(nodes) if k != j)
        for j, here in enumerate(nodes)
    )

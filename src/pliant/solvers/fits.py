"""Moments and fit rules: how outputs at several nodes become the weights of one step (sheet D, 14.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pliant.errors import PlanError, suggest


def moments(h: float, decay: float, count: int) -> list[float]:
    """`M_k = int_0^h exp(-decay*(h-u)) u^k du` for k = 0..count-1; h and decay of any sign, decay 0 allowed.

    The recursion `M_k = (h^k - k M_{k-1})/decay` cancels for small |decay*h|; there the series
    `h^(k+1) k! sum_j (-decay*h)^j / (k+1+j)!` is used, to full precision (sheet D, section 0).
    """
    z = decay * h
    found: list[float] = []
    for k in range(count):
        if abs(z) < 0.5 + k:
            found.append(_moment_series(h, z, k))
        elif k == 0:
            found.append(-math.expm1(-z) / decay)
        else:
            found.append((h**k - k * found[-1]) / decay)
    return found


def _moment_series(h: float, z: float, k: int) -> float:
    term = h ** (k + 1) / (k + 1)  # k!/(k+1)! at j = 0
    total, j = term, 0
    while abs(term) > 1e-18 * abs(total):
        j += 1
        term *= -z / (k + 1 + j)
        total += term
    return total


Fit: TypeAlias = Callable[[Sequence[float], float, Sequence[float]], list[float]]
"""(moments M_0.., step h, node offsets nu_j with the newest first) -> weights w_j."""


def lagrange(moment: Sequence[float], h: float, offsets: Sequence[float]) -> list[float]:
    """Exact for polynomials through the nodes: solves `sum_j w_j nu_j^k = M_k`, k < n.

    Bjorck-Pereyra's elimination on nodes scaled by h: no matrix, and accurate where a general solve is not.
    """
    nodes = [nu / h for nu in offsets]
    w = [m / h**k for k, m in enumerate(moment[: len(nodes)])]
    last = len(nodes) - 1
    for k in range(last):
        for i in range(last, k, -1):
            w[i] -= nodes[k] * w[i - 1]
    for k in reversed(range(last)):
        for i in range(k + 1, last + 1):
            w[i] /= nodes[i] - nodes[i - k - 1]
        for i in range(k, last):
            w[i] -= w[i + 1]
    return w


def midpoint(moment: Sequence[float], h: float, offsets: Sequence[float]) -> list[float]:
    """DPM-Solver's published two-node rule (= UniPC's bh2): slope times M_0 h/2, not M_1; else lagrange."""
    return _half_step(moment[0], moment, h, offsets)


def bh1(moment: Sequence[float], h: float, offsets: Sequence[float]) -> list[float]:
    """UniPC's B(h) = h rule for two nodes; it cancels in every other order, where lagrange is exact."""
    return _half_step(h, moment, h, offsets)


def _half_step(scale: float, moment: Sequence[float], h: float, offsets: Sequence[float]) -> list[float]:
    if len(offsets) != 2:
        return lagrange(moment, h, offsets)
    if offsets[0] != 0.0:
        raise PlanError("the two-node rules 'midpoint' and 'bh1' need the base node's output first; use 'lagrange'")
    other = scale * h / (2.0 * offsets[1])
    return [moment[0] - other, other]


def published3(moment: Sequence[float], h: float, offsets: Sequence[float]) -> list[float]:
    """DPM-Solver++(3M) as published: half of the quadratic term is missing, so it is second order."""
    if len(offsets) != 3:
        return midpoint(moment, h, offsets)
    full = lagrange(moment, h, offsets)
    return [w - 0.5 * moment[2] * q for w, q in zip(full, _second_difference(offsets), strict=True)]


def _second_difference(offsets: Sequence[float]) -> tuple[float, float, float]:
    """The second divided difference as a row over three outputs."""
    v0, v1, v2 = offsets
    return 1.0 / ((v0 - v1) * (v0 - v2)), 1.0 / ((v1 - v0) * (v1 - v2)), 1.0 / ((v2 - v0) * (v2 - v1))


def mr_sampler(moment: Sequence[float], h: float, offsets: Sequence[float]) -> list[float]:
    """MR-Sampler's rules (arXiv 2502.07856): lagrange up to two nodes, the published third-order rule for three."""
    return published3(moment, h, offsets) if len(offsets) == 3 else lagrange(moment, h, offsets)


def diffusers_sde3(moment: Sequence[float], h: float, offsets: Sequence[float]) -> list[float]:
    """diffusers' sde-dpmsolver++ of order 3 (x0 form, tau = 1), defect included, for bit-compatibility only.

    Besides the missing half of `published3` its second difference carries -1/2 where +1/2 is right: an extra `-D2`
    without a factor of h, so the solver is first order only. Present in diffusers 0.42.1.
    """
    found = published3(moment, h, offsets)
    if len(offsets) != 3:
        return found
    # Their D2 = h^2 times the second divided difference; with c = 2 the builder multiplies weights by c.
    return [w - 0.5 * h * h * q for w, q in zip(found, _second_difference(offsets), strict=True)]


@dataclass(frozen=True)
class Pseudo:
    """Constant weights that sum to 1, times M_0: PNDM's pseudo-linear multistep and Runge-Kutta rows.

    The only rule besides order 1 that survives an infinite step: it needs the total of the transfer, not its moments.
    """

    weights: tuple[float, ...]

    def __call__(self, moment: Sequence[float], h: float, offsets: Sequence[float]) -> list[float]:
        return self.shares(moment[0], len(offsets))

    def shares(self, total: float, count: int) -> list[float]:
        """`total` divided among `count` outputs."""
        if len(self.weights) != count:
            raise PlanError(f"{len(self.weights)} weights for {count} outputs; give one per output, newest first")
        return [total * w for w in self.weights]


def taylor(stencils: Sequence[Sequence[int]], scale: float = 1.0) -> Fit:
    """USF's rule (arXiv 2312.07243): a Taylor polynomial at the base node, each derivative from its own stencil.

    stencils[k-1]: places among the outputs (not 0, the base) from which the k-th derivative is estimated, at least k of
    them. scale: factor on the first derivative only ("relaxation"). All stencils equal to all nodes and scale 1 is
    lagrange.
    """

    def fit(moment: Sequence[float], h: float, offsets: Sequence[float]) -> list[float]:
        weights = [moment[0]] + [0.0] * (len(offsets) - 1)
        for k, stencil in enumerate(stencils, start=1):
            places = [0, *stencil]
            # The row of the k-th derivative: exact on monomials through the stencil.
            wanted = [float(math.factorial(k)) if power == k else 0.0 for power in range(len(places))]
            row = lagrange(wanted, h, [offsets[j] for j in places])
            factor = moment[k] / math.factorial(k) * (scale if k == 1 else 1.0)
            for place, value in zip(places, row, strict=True):
                weights[place] += factor * value
        return weights

    return fit


def raw(weights: Sequence[float]) -> Fit:
    """The weights themselves (OLSS, learned solvers): no moments involved."""
    return lambda moment, h, offsets: list(weights)


FITS: dict[str, Fit] = {
    "lagrange": lagrange,
    "midpoint": midpoint,
    "bh1": bh1,
    "published3": published3,
    "mr-sampler": mr_sampler,
    "diffusers-sde3": diffusers_sde3,
}


def get_fit(fit: str | Fit) -> Fit:
    """A fit rule by name; a function is returned unchanged. Raises PlanError with the nearest name."""
    if callable(fit):
        return fit
    if fit not in FITS:
        raise PlanError(f"unknown fit rule {fit!r}: {suggest(fit, FITS)}")
    return FITS[fit]

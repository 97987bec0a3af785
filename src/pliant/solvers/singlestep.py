"""DPM-Solver's singlestep methods: stages inside a step, nothing remembered (sheet D, 1.4, 1.5 and 1.7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from pliant.errors import PlanError, suggest
from pliant.paths import Path
from pliant.solvers.builder import Held, ProgramBuilder
from pliant.solvers.coefficients import depth_of_tau, finite_form
from pliant.solvers.exponential import Taper, check_order, check_taper
from pliant.solvers.fits import get_fit
from pliant.solvers.solver import Solver

_FORMS = ("sample", "epsilon")
_FITS = ("midpoint", "lagrange")


def _check(order: int, form: str, fit: str, name: str) -> None:
    check_order(order, 3, name)
    get_fit(fit)
    for what, value, known in (("form", form, _FORMS), ("fit", fit, _FITS)):
        if value not in known:
            raise PlanError(f"{name} has no {what} {value!r}: {suggest(value, known)}")


def _last_stage(stages: Sequence[Held], fit: str) -> tuple[list[Held], str]:
    """Which of the stages (base first) make the step, and by which rule.

    DPM-Solver's default ("midpoint") drops the middle stage at third order and takes the line through the outer two.
    """
    if len(stages) == 3 and fit == "midpoint":
        return [stages[0], stages[2]], "lagrange"
    return list(stages), fit


def emit_singlestep(
    b: ProgramBuilder, i: int, order: int, form: str, fit: str, inner: Sequence[float], also_lower: bool = False
) -> list[int]:
    """Step i through stages at the `inner` shares of its log-SNR; returns the state at node i+1.

    also_lower: and before it the state that order-1 makes of the same stages (the pair of the adaptive driver). The
    current state does not advance. An infinite step is first order.
    """
    s, t = b.nodes[i], b.nodes[i + 1]
    form = finite_form(form, s, t)
    base, stages, found = (b.state, s), [b.output(i)], list[int]()
    highest = order if math.isfinite(b.span(form, s, t)) else 1
    for k in range(1, highest + 1):
        if k > 1:
            node = b.inner(i, form, inner[k - 2])
            # The stage states themselves use every stage so far (sheet D, 1.5: two-node "taylor" weights).
            stages.append(b.evaluate(node, b.transfer(form, node, stages, base=base)))
        if k == highest or (also_lower and k == highest - 1):
            outputs, rule = _last_stage(stages, fit)
            found.append(b.transfer(form, t, outputs, base=base, fit=rule))
    return found


@dataclass(frozen=True)
class Singlestep(Solver):
    """DPM-Solver-2/3 and DPM-Solver++(2S/3S) (arXiv 2206.00927, 2211.01095): `order` calls per step.

    form: "sample" (++) or "epsilon". fit: "midpoint" (published default) or "lagrange" ("taylor"). inner: where the
    stages lie, as shares of the step in log-SNR; by default 1/2, or 1/3 and 2/3. A step to sigma = 0 is first order.
    """

    order: int = 2
    form: str = "sample"
    fit: str = "midpoint"
    inner: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", tuple(self.inner))
        _check(self.order, self.form, self.fit, "a singlestep solver")
        if self.inner and (len(self.inner) != self.order - 1 or not _inside(self.inner)):
            raise PlanError(
                f"order {self.order} has {self.order - 1} inner nodes in (0, 1), ascending, got {self.inner}"
            )

    @property
    def convergence(self) -> int:
        return self.order

    @property
    def evaluations_per_step(self) -> int:
        return self.order

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        inner = self.inner or ((0.5,) if self.order == 2 else (1.0 / 3.0, 2.0 / 3.0))
        states = emit_singlestep(builder, i, self.order, self.form, self.fit, inner)
        builder.advance(states[-1])


def _inside(shares: Sequence[float]) -> bool:
    return all(a < b for a, b in zip((0.0, *shares), (*shares, 1.0), strict=True))


def fast_orders(evaluations: int, order: int) -> list[int]:
    """Orders of the steps that spend a budget of calls exactly (DPM-Solver-fast; sheet D, 1.7)."""
    check_order(order, 3, "DPM-Solver-fast")
    if evaluations < 1:
        raise PlanError(f"a budget of calls is at least 1, got {evaluations}")
    if order == 1:
        return [1] * evaluations
    if order == 2:
        return [2] * (evaluations // 2) + [1] * (evaluations % 2)
    thirds, rest = divmod(evaluations, 3)
    return [3] * (thirds - 1) + [2, 1] if rest == 0 else [3] * thirds + [rest]


def fast_plan(
    path: Path, times: Tensor | Sequence[float], order: int = 3, form: str = "sample", fit: str = "midpoint"
) -> tuple[list[float], list[Singlestep]]:
    """(times, one solver per step) that spends one call per interval of `times` (evaluations+1 of them).

    The outer times are picked from the grid at cumulative orders, and the times between become the inner nodes
    (official DPM-Solver: re-spaced by the same rule, hence not at 1/3 and 2/3 unless the grid is uniform in log-SNR).
    """
    grid = torch.as_tensor(times, dtype=torch.float64)
    orders = fast_orders(len(grid) - 1, order)
    places = [0, *accumulate(orders)]
    log_snr = path.log_snr(grid).tolist()
    solvers = []
    for first, last, k in zip(places, places[1:], orders, strict=False):
        if not all(map(math.isfinite, log_snr[first : last + 1])):
            k = 1  # no inner node towards infinity; the outer grid stays
        h = log_snr[last] - log_snr[first]
        inner = tuple((log_snr[first + j] - log_snr[first]) / h for j in range(1, k))
        solvers.append(Singlestep(k, form, fit, inner))
    return [float(grid[p]) for p in places], solvers


@dataclass(frozen=True)
class GridSinglestep(Solver):
    """Singlestep in diffusers' layout: every grid node is a stage, one call per step.

    Steps go in blocks of orders 1, 2(, 3) that all start from the block's first state, so every `order`-th state is a
    proper one. tau: 0 the ODE, 1 the SDE. lower_order_final: end with lower orders so that any number of steps works
    (default; otherwise a broken last block is dropped to what fits).
    """

    order: int = 2
    form: str = "sample"
    fit: str = "midpoint"
    tau: float = 0.0
    lower_order_final: Taper = True

    def __post_init__(self) -> None:
        _check(self.order, self.form, self.fit, "a grid singlestep solver")
        check_taper(self.lower_order_final)
        if not 0.0 <= self.tau < math.inf:
            raise PlanError(f"tau is 0 (the ODE), 1 (the reverse SDE) or any positive number, got {self.tau}")

    @property
    def convergence(self) -> int:
        return min(self.order, 2) if self.stochastic else self.order

    @property
    def stochastic(self) -> bool:
        return self.tau > 0.0

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        t = builder.nodes[i + 1]
        builder.output(i)
        k = min(block_orders(builder.steps, self.order, bool(self.lower_order_final))[i], _remembered(builder, i))
        s = builder.nodes[i - k + 1]
        while k > 1 and not math.isfinite(builder.span(self.form, s, t)):
            k -= 1
            s = builder.nodes[i - k + 1]
        outputs, fit = _last_stage(builder.history[k - 1 :: -1], self.fit)
        depth = depth_of_tau(self.tau, s, t)
        base = (builder.trail[i - k + 1], s)
        builder.advance(builder.transfer(finite_form(self.form, s, t), t, outputs, base=base, fit=fit, depth=depth))


def _remembered(b: ProgramBuilder, i: int) -> int:
    """How many of the newest outputs lie on the newest grid nodes, without a gap."""
    count = 0
    for output, node in zip(b.history, b.nodes[i::-1], strict=False):
        if output.node is not node:
            break
        count += 1
    return count


def block_orders(steps: int, order: int, lower_final: bool) -> list[int]:
    """diffusers' order of each step: blocks 1..order, the last ones shortened (sheet D, 13.7)."""
    block = list(range(1, order + 1))
    if not lower_final:
        return [block[i % order] for i in range(steps)]
    whole, rest = divmod(steps, order)
    if order == 1:
        return [1] * steps
    if rest == 0:  # the last block gives way to one of lower order and a single first-order step
        return block * (whole - 1) + block[:-1] + [1]
    return block * whole + block[:rest]

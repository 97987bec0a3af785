"""One step of a unified solver schedule: every choice of an exponential integrator, free at every step (sheet D, 4).

A plan may give each step its own `USF` solver; DPM-Solver, UniPC and singlestep schedules are special cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pliant.errors import PlanError, suggest
from pliant.solvers.builder import Held, ProgramBuilder
from pliant.solvers.coefficients import finite_form, get_form, order_allowed
from pliant.solvers.exponential import check_order
from pliant.solvers.fits import taylor
from pliant.solvers.solver import Solver

SCALES = ("none", "linear", "midpoint", "bh1", "plus-exp", "minus-exp")
CORRECTORS = ("none", "pseudo", "implicit")
_FORMS = ("sample", "epsilon")


def relaxation(scale: str, h: float, form: str, kappa: float = 0.0) -> float:
    """USF's factor on the first derivative (arXiv 2312.07243; sheet D, 4.6), 1 + O(h).

    "midpoint" turns the exact Taylor-2 into DPM-Solver-2's (= UniPC's bh2) rule, "bh1" into UniPC's bh1.
    """
    z = h if form == "epsilon" else -h
    if scale == "linear":
        return 1.0 + kappa * h
    if scale == "midpoint":
        return 0.5 * z * math.expm1(z) / _expm1_less(z)
    if scale == "bh1":
        return 0.5 * z * z / _expm1_less(z)
    if scale in ("plus-exp", "minus-exp"):
        return 1.0 + (0.5 if scale == "plus-exp" else -0.5) * math.expm1(z)
    return 1.0


def _expm1_less(z: float) -> float:
    """`exp(z) - 1 - z` without cancellation."""
    if abs(z) > 0.5:
        return math.expm1(z) - z
    term = total = 0.5 * z * z
    k = 2
    while abs(term) > 1e-18 * abs(total):
        k += 1
        term *= z / k
        total += term
    return total


@dataclass(frozen=True)
class USF(Solver):
    """A Taylor step with free choices (arXiv 2312.07243).

    order: terms of the Taylor polynomial (1..4). form: "sample" or "epsilon". start: 1 begins at the newest state
    (multistep), k at the state k-1 steps earlier (singlestep). stencils: for the k-th derivative (k = 1..order-1) the
    outputs that estimate it, by age: 0 is the newest; the start's own output is always in. Default: the newest order-1
    others for each. scale, kappa: `relaxation`. corrector: "none", "pseudo" (recompute the new state with the output
    found there, one order higher, no further call) or "implicit" (the same, and evaluate again at the corrected state).
    Outputs that do not exist yet are left out, and the order drops where too few are left.
    """

    order: int = 2
    form: str = "sample"
    start: int = 1
    stencils: tuple[tuple[int, ...], ...] = ()
    scale: str = "none"
    kappa: float = 0.0
    corrector: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stencils", tuple(tuple(s) for s in self.stencils))
        check_order(self.order, 4, "usf")
        check_order(self.start, 4, "usf's start")
        get_form(self.form)
        choices = (
            ("form", self.form, _FORMS),
            ("scale", self.scale, SCALES),
            ("corrector", self.corrector, CORRECTORS),
        )
        for what, value, known in choices:
            if value not in known:
                raise PlanError(f"usf has no {what} {value!r}: {suggest(value, known)}")
        if self.stencils and len(self.stencils) != self.order - 1:
            raise PlanError(
                f"order {self.order} has {self.order - 1} derivatives, but {len(self.stencils)} stencils are given"
            )
        for k, stencil in enumerate(self.stencils, start=1):
            if len(stencil) < k or len(set(stencil)) != len(stencil) or min(stencil) < 0 or self.start - 1 in stencil:
                raise PlanError(
                    f"derivative {k} needs at least {k} different outputs, aged 0 or more, other than the start's "
                    f"({self.start - 1}), got {stencil}"
                )

    @property
    def convergence(self) -> int:
        return self.order + (self.corrector != "none")

    @property
    def evaluations_per_step(self) -> int:
        return 2 if self.corrector == "implicit" else 1

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        builder.output(i)
        t = builder.nodes[i + 1]
        start = min(self.start, len(builder.history))
        while start > 1 and not math.isfinite(builder.span(self.form, builder.nodes[i + 1 - start], t)):
            start -= 1
        form = finite_form(self.form, builder.nodes[i + 1 - start], t)
        # Stencils name places of the history as it was meant to be; a shorter start keeps the default ones.
        stencils = self.stencils if start == self.start else ()
        predicted, used = self._step(builder, i, form, start, stencils)
        if self.corrector == "none" or i == builder.steps - 1:
            builder.advance(predicted)
            return
        builder.remember(builder.evaluate(t, predicted, ahead=self.corrector == "pseudo"))
        # Every stencil grows by the new output (age 0); the new highest derivative takes all there is.
        grown = [(0, *(age + 1 for age in stencil)) for stencil in used]
        grown.append(grown[-1] if grown else (0,))
        corrected, _ = self._step(builder, i, form, start + 1, grown)
        builder.advance(corrected)
        if self.corrector == "implicit":
            builder.history[0] = builder.evaluate(t, ahead=True)

    def _step(
        self, b: ProgramBuilder, i: int, form: str, start: int, stencils: Sequence[Sequence[int]]
    ) -> tuple[int, list[tuple[int, ...]]]:
        """The Taylor step from the output of age `start-1`; returns the new state and the stencils it used.

        stencils: none means the newest order-1 outputs for every derivative.
        """
        age = start - 1
        place = i - age if b.history[0].node is b.nodes[i] else i + 1 - age
        s, t = b.nodes[place], b.nodes[i + 1]
        others = [k for k in range(len(b.history)) if k != age]
        newest = tuple(others[: self.order - 1])
        wanted = [tuple(x) for x in stencils] or [newest] * len(newest)
        usable = self._usable(b, form, age, i, wanted)
        ages = [age, *sorted({k for stencil in usable for k in stencil})]
        outputs: list[Held] = [b.history[k] for k in ages]
        h = b.span(form, s, t)
        scale = relaxation(self.scale, h, form, self.kappa) if math.isfinite(h) else math.nan  # never read
        fit = taylor([[ages.index(k) for k in stencil] for stencil in usable], scale) if usable else "lagrange"
        return b.transfer(form, t, outputs, base=(b.trail[place], s), fit=fit), usable

    @staticmethod
    def _usable(
        b: ProgramBuilder, form: str, age: int, i: int, wanted: Sequence[tuple[int, ...]]
    ) -> list[tuple[int, ...]]:
        """The leading derivatives whose outputs exist and can be interpolated on this step."""
        found: list[tuple[int, ...]] = []
        rule, t = get_form(form), b.nodes[i + 1]
        for k, stencil in enumerate(wanted, start=1):
            stencil = tuple(j for j in stencil if j < len(b.history))
            if len(stencil) < k:
                break
            s = b.history[age].node
            nodes = [s, *(b.history[j].node for j in stencil)]
            if not math.isfinite(b.span(form, s, t)) or order_allowed(rule, s, t, nodes) < len(nodes):
                break
            found.append(stencil)
        return found

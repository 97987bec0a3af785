"""UniPC (arXiv 2302.04867), and DC-Solver's compensation of its history (arXiv 2409.03755)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pliant.errors import PlanError, suggest
from pliant.solvers.builder import ProgramBuilder
from pliant.solvers.coefficients import finite_form
from pliant.solvers.exponential import Taper, check_order, check_taper, tapered
from pliant.solvers.solver import Solver

# B(h) matters for two nodes only (predictor of order 2, corrector of order 1); elsewhere it cancels.
B_RULES = {"bh1": "bh1", "bh2": "midpoint", "exact": "lagrange"}
_FORMS = ("sample", "epsilon")


@dataclass(frozen=True)
class UniPC(Solver):
    """Predict through `order` outputs, evaluate, correct through the new output too: order+1 at one call per step.

    The evaluation at the *predicted* state is the next step's output (no call is spent on the corrected one). B: "bh2"
    (default), "bh1" or "exact". disable_corrector: step numbers that only predict (`[0]` helps at large guidance).
    lower_order_final: see `tapered`; "auto" here means any grid that ends at sigma = 0.
    """

    order: int = 2
    B: str = "bh2"
    form: str = "sample"
    disable_corrector: tuple[int, ...] = ()
    lower_order_final: Taper = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "disable_corrector", tuple(self.disable_corrector))
        check_order(self.order, 5, "unipc")
        check_taper(self.lower_order_final)
        for what, value, known in (("B", self.B, tuple(B_RULES)), ("form", self.form, _FORMS)):
            if value not in known:
                raise PlanError(f"unipc has no {what} {value!r}: {suggest(value, known)}")

    @property
    def convergence(self) -> int:
        return self.order + 1

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        s, t = builder.nodes[i], builder.nodes[i + 1]
        builder.output(i)
        self._adjust(builder, i)
        form, fit = finite_form(self.form, s, t), B_RULES[self.B]
        base = (builder.state, s)
        outputs = builder.usable(form, s, t, tapered(self.order, builder, i, self.lower_order_final, few=10**9))
        predicted = builder.transfer(form, t, outputs, base=base, fit=fit)
        last = i == builder.steps - 1 or not math.isfinite(builder.span(form, s, t))
        if last or i in self.disable_corrector:
            builder.advance(predicted)
            return
        new = builder.evaluate(t, predicted, ahead=True)
        builder.advance(builder.transfer(form, t, [*outputs, new], base=base, fit=fit))
        builder.remember(new)

    def _adjust(self, b: ProgramBuilder, i: int) -> None:
        """A place for what happens to the history before a step."""


@dataclass(frozen=True)
class DCSolver(UniPC):
    """UniPC whose newest output is replaced, before each step, by the history's polynomial at another time.

    ratios: one number per step; 1, and steps beyond the list, change nothing. degree: of the polynomial
    in t; the first `degree` steps have too little history and stay as they are.
    """

    order: int = 3
    ratios: tuple[float, ...] = ()
    degree: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ratios", tuple(float(r) for r in self.ratios))
        if not all(map(math.isfinite, self.ratios)):
            raise PlanError(f"compensation ratios are finite numbers around 1, got {self.ratios}")
        check_order(self.degree, 5, "the compensation polynomial")

    def _adjust(self, b: ProgramBuilder, i: int) -> None:
        if i < len(self.ratios):
            b.compensate(self.ratios[i], self.degree)

"""Explicit Runge-Kutta methods: a method is its tableau (sheet D, 13.1), applied in any form without a decay.

In form "velocity" they integrate dx/dt = v(x, t) on every path; in "epsilon-rho" EDM's dy/drho = eps (y = x/alpha,
rho = sigma/alpha), where Heun is EDM's sampler (arXiv 2206.00364); in "angle" dx/dtheta = v-prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pliant.errors import PlanError, suggest
from pliant.solvers.builder import Held, ProgramBuilder
from pliant.solvers.coefficients import FORMS, finite_form, get_form
from pliant.solvers.fits import raw
from pliant.solvers.program import Node
from pliant.solvers.solver import Solver


class Tableau(NamedTuple):
    """`k_i = f(x + h*sum_j a_ij k_j, u + c_i h)`, `x+ = x + h*sum_i b_i k_i`; converges like h^order."""

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


EULER = Tableau(1, (0.0,), ((),), (1.0,))
RK4 = Tableau(4, (0.0, 1 / 2, 1 / 2, 1.0), ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
TABLEAUS: dict[str, Tableau] = {
    "euler": EULER,
    "midpoint": Tableau(2, (0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0)),
    "heun": Tableau(2, (0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2)),
    "ralston": Tableau(2, (0.0, 2 / 3), ((), (2 / 3,)), (1 / 4, 3 / 4)),
    "kutta-3": Tableau(3, (0.0, 1 / 2, 1.0), ((), (1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6)),
    "heun-3": Tableau(3, (0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    "ssprk-3": Tableau(3, (0.0, 1.0, 1 / 2), ((), (1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3)),
    "bogacki-shampine-3": Tableau(3, (0.0, 1 / 2, 3 / 4), ((), (1 / 2,), (0.0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9)),
    "rk4": RK4,
    "rk-38": Tableau(
        4,
        (0.0, 1 / 3, 2 / 3, 1.0),
        ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
    "dormand-prince-5": Tableau(
        5,
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
}
METHOD_FORMS = ("velocity", "epsilon-rho", "angle")


def emit_tableau(
    b: ProgramBuilder,
    i: int,
    tableau: Tableau,
    form: str = "velocity",
    first: Held | None = None,
    source: Node | None = None,
) -> None:
    """One step of `tableau` to node i+1 from the current state, which lies at `source` (default: node i).

    first: the output there if there is one already. The first stage on a grid node joins the history.
    """
    t = b.nodes[i + 1]
    s = b.nodes[i] if source is None else source
    rule, start = get_form(form), b.state
    base, h = rule.variable(s), b.span(form, s, t)
    stages: list[Held] = [first or (b.output(i) if source is None else b.evaluate(s))]
    for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
        if c == 1.0:
            node = t
        elif source is None:
            node = b.inner(i, form, c)
        else:
            node = b.node_at(form, base + c * h)
        stages.append(b.evaluate(node, _stage(b, form, (start, s), node, stages, row, h)))
    b.advance(_stage(b, form, (start, s), t, stages, tableau.b, h))


def _stage(
    b: ProgramBuilder, form: str, base: tuple[int, Node], t: Node, stages: list[Held], row: tuple[float, ...], h: float
) -> int:
    """The state `x_base + h * sum row_j k_j` at node t."""
    used = [(r, k) for r, k in zip(row, stages, strict=True) if r != 0.0]
    return b.transfer(form, t, [k for _, k in used], base=base, fit=raw([h * r for r, _ in used]))


@dataclass(frozen=True)
class RungeKutta(Solver):
    """A tableau's method: one call per stage and step, nothing remembered.

    method: a name in `TABLEAUS`. form: the variable of the steps: "velocity" (t), "epsilon-rho" (EDM's sigma), "angle".
    last: what a step that arrives at sigma = 0 does if a stage lies there: "euler" (default; EDM's and diffusers' rule:
    networks are not trained at sigma = 0) or "full" (evaluate there too; needs a form that is finite at data).
    """

    method: str = "heun"
    form: str = "velocity"
    last: str = "euler"

    def __post_init__(self) -> None:
        if self.method not in TABLEAUS:
            raise PlanError(f"unknown Runge-Kutta method {self.method!r}: {suggest(self.method, TABLEAUS)}")
        if self.form not in METHOD_FORMS:
            get_form(self.form)
            others = ", ".join(sorted(set(FORMS) - set(METHOD_FORMS)))
            raise PlanError(f"Runge-Kutta steps need a form without decay: {', '.join(METHOD_FORMS)}; not {others}")
        if self.last not in ("euler", "full"):
            raise PlanError(f"the last step of {self.method} is 'euler' or 'full', got {self.last!r}")

    @property
    def convergence(self) -> int:
        return TABLEAUS[self.method].order

    @property
    def evaluations_per_step(self) -> int:
        return len(TABLEAUS[self.method].c)

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        s, t, tableau = builder.nodes[i], builder.nodes[i + 1], TABLEAUS[self.method]
        if finite_form(self.form, s, t) != self.form:
            _first_order(builder, i, finite_form(self.form, s, t))
        elif t.sigma == 0.0 and self.last == "euler" and 1.0 in tableau.c:
            emit_tableau(builder, i, EULER, self.form)
        else:
            emit_tableau(builder, i, tableau, self.form)


def _first_order(b: ProgramBuilder, i: int, form: str) -> None:
    """At an end of the path where the form does not exist."""
    outputs = [b.output(i)]
    b.advance(b.transfer(form, b.nodes[i + 1], outputs, base=(b.state, b.nodes[i])))

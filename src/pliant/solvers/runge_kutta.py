"""Explicit Runge-Kutta on the probability-flow ODE dx/dt = v(x, t) (sheet D, 13.1). A method is its
tableau.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from pliant.errors import PlanError
from pliant.solvers.builder import ProgramBuilder, Stored
from pliant.solvers.fits import pseudo
from pliant.solvers.program import Node
from pliant.solvers.solver import Solver


class Tableau(NamedTuple):
    """`k_i = v(x + h*sum_j a_ij k_j, t + c_i h)`, `x+ = x + h*sum_i b_i k_i`."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


EULER = Tableau(c=(0.0,), a=((),), b=(1.0,))
HEUN = Tableau(c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5))
MIDPOINT = Tableau(c=(0.0, 0.5), a=((), (0.5,)), b=(0.0, 1.0))


def emit_tableau(b: ProgramBuilder, i: int, tableau: Tableau) -> None:
    """One step of `tableau`; the first stage joins the history of multistep solvers."""
    s, t = b.nodes[i], b.nodes[i + 1]
    start = b.state
    stages: list[Stored] = [b.evaluate(s)]
    b.remember(stages[0])
    for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
        node = t if c == 1.0 else b.node(s.t + c * (t.t - s.t))
        stages.append(b.evaluate(node, _stage(b, start, s, node, stages, row, h=t.t - s.t)))
    b.advance(_stage(b, start, s, t, stages, tableau.b, h=t.t - s.t))


def _stage(
    b: ProgramBuilder, start: int, s: Node, t: Node, stages: list[Stored], row: tuple[float, ...], h: float
) -> int:
    """The state `x_start + h * sum row_j k_j` at node t."""
    used = [(r, k) for r, k in zip(row, stages, strict=True) if r != 0.0]
    # Rows are relative to the whole step h, `pseudo` to the stage's own t - s; the two differ for inner
    # stages.
    share = h / (t.t - s.t)
    return b.transfer("velocity", t, [k for _, k in used], base=(start, s), fit=pseudo([r * share for r, _ in used]))


@dataclass(frozen=True)
class Euler(Solver):
    """Euler in t: flow matching's default. On the straight (linear) path it equals DDIM."""

    name: ClassVar[str] = "euler"
    order: ClassVar[int] = 1

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        emit_tableau(builder, i, EULER)


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's trapezoid in t, two calls per step.

    last: what a step that arrives at sigma = 0 does: "euler" (default; EDM's and diffusers' rule: networks
    are not trained at sigma = 0) or "heun" (evaluate there too; needs a path whose velocity is finite at
    data).
    """

    name: ClassVar[str] = "heun"
    order: ClassVar[int] = 2
    evaluations_per_step: ClassVar[int] = 2

    last: str = "euler"

    def __post_init__(self) -> None:
        if self.last not in ("euler", "heun"):
            raise PlanError(f"heun's last step is 'euler' or 'heun', got {self.last!r}")

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        single = builder.nodes[i + 1].sigma == 0.0 and self.last == "euler"
        emit_tableau(builder, i, EULER if single else HEUN)


@dataclass(frozen=True)
class Midpoint(Solver):
    """The explicit midpoint rule in t, two calls per step; never evaluates at the end of the grid."""

    name: ClassVar[str] = "midpoint"
    order: ClassVar[int] = 2
    evaluations_per_step: ClassVar[int] = 2

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        emit_tableau(builder, i, MIDPOINT)


__all__ = ["Euler", "Heun", "Midpoint", "Tableau", "emit_tableau"]

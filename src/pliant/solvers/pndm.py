"""PNDM (arXiv 2202.09778): classical combinations of the noise prediction, moved by DDIM's transfer."""

from __future__ import annotations

from dataclasses import dataclass

from pliant.errors import PlanError, suggest
from pliant.solvers.builder import Held, ProgramBuilder
from pliant.solvers.coefficients import finite_form
from pliant.solvers.exponential import check_order
from pliant.solvers.fits import Pseudo
from pliant.solvers.runge_kutta import RK4
from pliant.solvers.solver import Solver

# Adams-Bashforth with constant steps, newest first (sheet D, 13.2). Weights that sum to 1 take the exact transfer.
ADAMS_BASHFORTH: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
WARMUPS = ("prk", "plms", "euler")


@dataclass(frozen=True)
class PNDM(Solver):
    """Pseudo-linear multistep in epsilon; second order whatever `order` (the weights ignore the exponential).

    warmup: "prk" (F-PNDM: pseudo Runge-Kutta, 4 calls, until `order`-1 outputs are known), "plms" (one pseudo improved
    Euler step, 2 calls, then growing orders: Stable Diffusion's PLMS, with order 2 S-PNDM) or "euler" (growing orders).
    """

    form = "epsilon"

    order: int = 4
    warmup: str = "plms"

    def __post_init__(self) -> None:
        check_order(self.order, 4, "pndm")
        if self.warmup not in WARMUPS:
            raise PlanError(f"unknown pndm warm-up {self.warmup!r}: {suggest(self.warmup, WARMUPS)}")

    @property
    def convergence(self) -> int:
        return min(self.order, 2)

    def emit(self, builder: ProgramBuilder, i: int) -> None:
        newest = builder.output(i)
        s, t = builder.nodes[i], builder.nodes[i + 1]
        if (form := finite_form(self.form, s, t)) != self.form:  # leaving alpha = 0: only a first-order step exists
            builder.advance(builder.transfer(form, t, [newest], base=(builder.state, s)))
        elif self.warmup == "prk" and len(builder.history) < self.order:
            self._runge_kutta(builder, i, newest)
        elif self.warmup == "plms" and len(builder.history) == 1 and self.order > 1:
            self._improved_euler(builder, i, newest)
        else:
            outputs = builder.history[: self.order]
            self._move(builder, i, outputs, ADAMS_BASHFORTH[len(outputs)])

    def _runge_kutta(self, b: ProgramBuilder, i: int, newest: Held) -> None:
        """The classical tableau on predictions: stages halfway in *time*, each reached by a transfer of its own."""
        base = (b.state, b.nodes[i])
        stages: list[Held] = [newest]
        for c, row in zip(RK4.c[1:], RK4.a[1:], strict=True):
            node = b.nodes[i + 1] if c == 1.0 else b.inner(i, "velocity", c)
            used = next(k for k, a in zip(stages, row, strict=True) if a != 0.0)  # one output per stage in this tableau
            stages.append(b.evaluate(node, b.transfer(self.form, node, [used], base=base)))
        self._move(b, i, stages, RK4.b)

    def _improved_euler(self, b: ProgramBuilder, i: int, newest: Held) -> None:
        """`(e(x, s) + e(transfer(x), t))/2`; the second call does not join the history."""
        s, t = b.nodes[i], b.nodes[i + 1]
        ahead = b.transfer(self.form, t, [newest], base=(b.state, s))
        self._move(b, i, [newest, b.evaluate(t, ahead)], (0.5, 0.5))

    def _move(self, b: ProgramBuilder, i: int, outputs: list[Held], weights: tuple[float, ...]) -> None:
        base = (b.state, b.nodes[i])
        b.advance(b.transfer(self.form, b.nodes[i + 1], outputs, base=base, fit=Pseudo(weights)))

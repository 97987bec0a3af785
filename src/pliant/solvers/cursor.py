"""A program run from outside, one network output at a time: for loops that are not ours (sheet D, 14.6).

The program is cut before each evaluation. Whoever owns the loop calls the network and feeds its output; the cursor
executes the linear updates up to the next evaluation and returns the state the network should see there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import PlanError
from pliant.solvers.interpreter import NetworkOutput, Noise, _checked, _lin
from pliant.solvers.program import Eval, Lin, Program, Register

_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Update:
    """One linear update, the noise slots it reads and the registers dead after it."""

    lin: Lin
    slots: tuple[int, ...]
    dead: tuple[Register, ...]


@dataclass(frozen=True)
class Cut:
    """One evaluation, the registers dead after it, and the updates between it and the next."""

    evaluation: Eval
    dead: tuple[Register, ...]
    updates: tuple[Update, ...]
    returns: int
    """The state register the next evaluation sees, or the sample."""


def cut(program: Program) -> tuple[Cut, ...]:
    """The program as a list of cuts. Raises PlanError unless the first evaluation sees the start state."""
    pieces: list[tuple[Eval, tuple[Register, ...], list[Update]]] = []
    for op, dead in zip(program.instructions(), program.last_uses(), strict=True):
        if isinstance(op, Eval):
            pieces.append((op, dead, []))
        elif pieces:
            pieces[-1][2].append(Update(op, tuple(slot for kind, slot in op.reads() if kind == "z"), dead))
    if not pieces:
        raise PlanError("this program never calls the network, so there is nothing to step through")
    following = [e.state for e, _, _ in pieces[1:]] + [program.final]
    return tuple(Cut(e, d, tuple(u), r) for (e, d, u), r in zip(pieces, following, strict=True))


def spread_at_first_evaluation(program: Program, spread: float) -> float:
    """Standard deviation of the state the first evaluation sees, for a start of N(0, spread^2).

    Solvers that add noise before their first call (EDM's churn) only change this number when the start is fresh noise:
    the loop's owner then starts there. Raises PlanError if a later update reads what came before.
    """
    first = program.evaluations[0]
    rows: dict[int, tuple[float, dict[int, float]]] = {0: (1.0, {})}
    prefix: list[Lin] = []
    for op in program.instructions():
        if isinstance(op, Eval):
            break
        prefix.append(op)
        if op.m or op.mu or op.learned:
            raise PlanError("this program starts with an update that needs more than the start state")
        x = sum(c * rows[i][0] for i, c in op.x)
        z = dict(op.z)
        for i, c in op.x:
            for slot, size in rows[i][1].items():
                z[slot] = z.get(slot, 0.0) + c * size
        rows[op.out] = (x, z)
    if first.state not in rows:
        raise PlanError("the first evaluation sees a state that is not made from the start alone")
    early: set[Register] = {("x", i) for i in rows if i != first.state} | {("z", s) for op in prefix for s, _ in op.z}
    after = (op for op in program.instructions() if isinstance(op, Lin) and op not in prefix)
    if prefix and any(register in early for op in after for register in op.reads()):
        raise PlanError("this solver returns to the state before its first evaluation; it only runs in Pliant's loop")
    x, z = rows[first.state]
    return math.hypot(x * spread, *z.values())


class Cursor:
    """The state of one run. `evaluation` is the call to make next, None at the end."""

    def __init__(self, cuts: Sequence[Cut], variance_outputs: frozenset[int] = frozenset()) -> None:
        self._cuts = cuts
        self._variance = variance_outputs
        self._registers: dict[Register, Tensor] = {}
        self._place = 0

    @property
    def evaluation(self) -> Eval | None:
        return self._cuts[self._place].evaluation if self._place < len(self._cuts) else None

    def feed(self, state: Tensor, output: NetworkOutput, noise: Noise) -> Tensor:
        """Take the network's output at `state`, which replaces what the cursor thought the state was; go on.

        Returns the next state to evaluate, or the sample, in float32 or wider. noise(slot): as in `run`.
        """
        if self._place >= len(self._cuts):
            raise PlanError("this run is complete; start a new one")
        piece, registers = self._cuts[self._place], self._registers
        op = piece.evaluation
        if state.dtype not in _WIDE:
            state = state.float()
        registers["x", op.state] = state
        registers["m", op.out] = _checked(output.value, state, "the network's output")
        if op.out in self._variance:
            if output.variance is None:
                raise PlanError(f"step {op.step} uses a learned variance, but the network returned none")
            registers["u", op.out] = _checked(output.variance, state, "the network's variance")
        _free(registers, piece.dead)
        for update in piece.updates:
            for slot in update.slots:
                if ("z", slot) not in registers:
                    registers["z", slot] = _checked(noise(slot), state, f"noise {slot}")
            registers["x", update.lin.out] = _lin(update.lin, registers, state, None)
            _free(registers, update.dead)
        self._place += 1
        return registers["x", piece.returns]  # alive: the next call reads it, and the sample never dies


def _free(registers: dict[Register, Tensor], dead: Sequence[Register]) -> None:
    for register in dead:
        registers.pop(register, None)

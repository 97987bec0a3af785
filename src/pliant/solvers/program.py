"""A solver program: the straight-line table that every sampler compiles to (sheet D, 14.2).

Two instructions suffice. `Eval` calls the network at a stored state; `Lin` writes a new state as a linear
combination of stored states x, stored network outputs m, noise slots z and the path's offset mu. Every number
that makes DDIM differ from Heun sits in the float64 coefficients, so programs can be printed, compared,
serialised and searched.

Registers are numbered and written once. State 0 is the start; outputs are numbered in order of evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pliant.errors import PlanError
from pliant.paths import PredictionType, prediction_type

if TYPE_CHECKING:
    from pliant.solvers.normal_form import NormalForm

Terms: TypeAlias = tuple[tuple[int, float], ...]  # ((register, coefficient), ...), sorted by register
RegisterKind: TypeAlias = Literal["x", "m", "u", "z"]  # state, output, variance code of an output, noise
Register: TypeAlias = tuple[RegisterKind, int]


@dataclass(frozen=True)
class Node:
    """One point of a path: `x = alpha*x0 + sigma*eps + beta*mu`, with d/dt of alpha and sigma at house time
    t.

    `t` is what the denoiser is called with, alpha and sigma are what the algebra uses. `dsigma` is infinite
    where a variance-preserving path reaches sigma = 0.
    """

    t: float
    alpha: float
    sigma: float
    dalpha: float
    dsigma: float
    beta: float = 0.0

    @property
    def log_snr(self) -> float:
        """Half log-SNR ln(alpha/sigma): +inf at sigma = 0, -inf at alpha = 0."""
        if self.sigma == 0.0:
            return math.inf
        return -math.inf if self.alpha == 0.0 else math.log(self.alpha) - math.log(self.sigma)


@dataclass(frozen=True)
class Eval:
    """`m[out] = evaluate(x[state], this)`. `step` is the plan step that says what the evaluation may cost.

    lands: house time that the update from here goes to in one jump, for networks that are told (flow maps); None: the
    answer is the prediction at `node` itself.
    """

    out: int
    state: int
    node: Node
    step: int
    lands: float | None = None


@dataclass(frozen=True)
class LearnedNoise:
    """Noise whose size the network predicts (Improved DDPM, arXiv 2102.09672, eq. 15).

    Adds `exp((f*log_high + (1-f)*log_low)/2) * z[slot]`, f = (u+1)/2, u = the variance code that came with
    `output`.
    """

    slot: int
    output: int
    log_low: float
    log_high: float


@dataclass(frozen=True)
class Lin:
    """`x[out] = sum x-terms + sum m-terms + sum z-terms + mu * offset (+ learned noise)`, at `node`."""

    out: int
    node: Node
    x: Terms = ()
    m: Terms = ()
    z: Terms = ()
    mu: float = 0.0
    learned: LearnedNoise | None = None

    def reads(self) -> Iterator[Register]:
        """Every register this instruction needs, each once."""
        yield from (("x", i) for i, _ in self.x)
        yield from (("m", i) for i, _ in self.m)
        slots = {i for i, _ in self.z}
        if self.learned is not None:
            yield ("u", self.learned.output)
            slots.add(self.learned.slot)
        yield from (("z", i) for i in sorted(slots))


Instruction: TypeAlias = Eval | Lin


@dataclass(frozen=True)
class Program:
    """Instructions grouped by step, with the path they were compiled for.

    stored: the prediction kind of every `m` register (what `evaluate` must return; conversions are in the
    coefficients). final: the state register that holds the sample. labels: one solver name per step, for
    people. Raises PlanError if an instruction reads what nothing wrote, writes twice, or holds a number that
    is not finite.
    """

    path: dict[str, Any]
    stored: PredictionType
    steps: tuple[tuple[Instruction, ...], ...]
    start: Node
    end: Node
    final: int
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        prediction_type(self.stored)
        _validate(self)

    def instructions(self) -> Iterator[Instruction]:
        """All instructions in order of execution."""
        for step in self.steps:
            yield from step

    @property
    def evaluations(self) -> tuple[Eval, ...]:
        """All network calls in order; evaluation k writes output k."""
        return tuple(i for i in self.instructions() if isinstance(i, Eval))

    @cached_property
    def num_evaluations(self) -> int:
        return len(self.evaluations)

    @cached_property
    def noise_slots(self) -> tuple[int, ...]:
        """Every noise slot that is read, ascending."""
        return tuple(
            sorted({i for op in self.instructions() if isinstance(op, Lin) for k, i in op.reads() if k == "z"})
        )

    @cached_property
    def needs_offset(self) -> bool:
        """Whether some instruction adds the path's offset mu."""
        return any(isinstance(op, Lin) and op.mu != 0.0 for op in self.instructions())

    @cached_property
    def variance_outputs(self) -> frozenset[int]:
        """Outputs whose variance code is read: `evaluate` must return it for these."""
        return frozenset(op.learned.output for op in self.instructions() if isinstance(op, Lin) and op.learned)

    @cached_property
    def _last_uses(self) -> tuple[tuple[Register, ...], ...]:
        last: dict[Register, int] = {}
        for place, op in enumerate(self.instructions()):
            reads: Iterable[Register] = (("x", op.state),) if isinstance(op, Eval) else op.reads()
            for register in reads:
                last[register] = place
            # A register that nobody ever reads dies where it is written.
            last[("m" if isinstance(op, Eval) else "x", op.out)] = place
        last.pop(("x", self.final), None)
        dead: list[list[Register]] = [[] for _ in range(sum(map(len, self.steps)))]
        for register, place in last.items():
            dead[place].append(register)
        return tuple(tuple(d) for d in dead)

    def last_uses(self) -> tuple[tuple[Register, ...], ...]:
        """Per instruction, in order: the registers nothing reads after it. The final state never dies."""
        return self._last_uses

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; floats survive exactly."""
        from pliant.solvers.serialization import program_to_dict

        return program_to_dict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Program:
        """Inverse of `to_dict`. Raises FormatError for unknown or missing keys."""
        from pliant.solvers.serialization import program_from_dict

        return program_from_dict(data)

    def describe(self) -> str:
        """A readable table: one line per instruction."""
        from pliant.solvers.describe import describe_program

        return describe_program(self)

    def normal_form(self) -> NormalForm:
        """Every state as a row over (start, outputs, noises, mu): two programs with equal rows are equal."""
        from pliant.solvers.normal_form import normal_form

        return normal_form(self)


def _validate(program: Program) -> None:
    """Raise PlanError unless the program can run from top to bottom."""
    if len(program.labels) != len(program.steps):
        raise PlanError(f"program has {len(program.steps)} steps but {len(program.labels)} labels; give one per step")
    states, outputs = {0}, 0
    for number, step in enumerate(program.steps):
        if not any(isinstance(op, Lin) for op in step):
            raise PlanError(f"step {number} writes no state; every step needs at least one Lin")
        for op in step:
            if isinstance(op, Eval):
                if op.state not in states:
                    raise PlanError(f"step {number} evaluates state {op.state}, which nothing has written")
                if op.out != outputs:
                    raise PlanError(
                        f"step {number} writes output {op.out}, expected {outputs}: outputs count up from 0"
                    )
                outputs += 1
            else:
                _validate_lin(op, number, states, outputs)
                states.add(op.out)
    if program.final not in states:
        raise PlanError(f"the final state {program.final} is never written")


def _validate_lin(op: Lin, number: int, states: set[int], outputs: int) -> None:
    if op.out in states:
        raise PlanError(f"step {number} writes state {op.out} twice; registers are written once")
    for kind, index in op.reads():
        known = index in states if kind == "x" else 0 <= index < outputs if kind in ("m", "u") else index >= 0
        if not known:
            raise PlanError(f"step {number} reads {kind}{index} for state {op.out}, which nothing has written")
    numbers = [c for terms in (op.x, op.m, op.z) for _, c in terms] + [op.mu]
    if op.learned is not None:
        numbers += [op.learned.log_low, op.learned.log_high]
    if not all(map(math.isfinite, numbers)):
        raise PlanError(f"step {number} has a coefficient that is not finite for state {op.out} at t={op.node.t:g}")

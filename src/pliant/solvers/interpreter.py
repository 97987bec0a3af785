"""The one loop that runs every solver program.

Coefficients are Python floats fixed at compile time; states are float32 or wider, whatever the network
computes in. Registers are freed after their last use, noise is drawn when it is first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from pliant.errors import PlanError, ShapeError
from pliant.paths import AlphaSigma, PredictionType, conversion
from pliant.solvers.program import Eval, LearnedNoise, Lin, Node, Program, Register


class NetworkOutput(Protocol):
    """What `evaluate` returns: `Output`, or anything with the same two attributes."""

    @property
    def value(self) -> Tensor: ...

    @property
    def variance(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Output:
    """A network's prediction (the program's stored kind, x's shape) and its variance code if it has one."""

    value: Tensor
    variance: Tensor | None = None


Evaluate: TypeAlias = Callable[[Tensor, Eval], NetworkOutput]
Noise: TypeAlias = Callable[[int], Tensor]
Combine: TypeAlias = Callable[[list[tuple[float, Tensor]], Tensor], Tensor]
"""(coefficients with tensors, a tensor of the result's shape and dtype) -> the weighted sum, a tensor of its own."""


class Ask(NamedTuple):
    """What `stepwise` wants to know: the network's output for the states `x` at an evaluation."""

    x: Tensor
    evaluation: Eval


@dataclass(frozen=True)
class StepResult:
    """What a step leaves: the state `x` at `node`, and the estimate of clean data, computed on demand."""

    index: int
    x: Tensor
    node: Node
    _estimate: _Estimate | None = field(repr=False)

    @cached_property
    def x0(self) -> Tensor:
        """The clean-data estimate of the latest network call (same shape as x).

        Raises PlanError before the first call, or where the prediction does not determine it (alpha = 0).
        """
        if self._estimate is None:
            raise PlanError(f"step {self.index} comes before the first network call, so there is no x0 estimate")
        return self._estimate.x0()


Stepwise: TypeAlias = Generator[Ask | StepResult, NetworkOutput | None, None]


@dataclass(frozen=True)
class _Estimate:
    """The latest evaluation: everything an x0 estimate needs."""

    node: Node
    stored: PredictionType
    state: Tensor
    value: Tensor
    mu: Tensor | None

    def x0(self) -> Tensor:
        p, q = sample_coefficients(self.stored, self.node)
        if self.mu is not None and self.node.beta != 0.0:
            return combine([(p, self.state), (q, self.value), (-p * self.node.beta, self.mu)], self.state)
        return combine([(p, self.state), (q, self.value)], self.state)


@lru_cache(maxsize=4096)
def sample_coefficients(stored: PredictionType, node: Node) -> tuple[float, float]:
    """(p, q) with `x0 = p*x + q*output` at this node. Raises PlanError where they do not exist."""
    values = (torch.tensor(v, dtype=torch.float64) for v in (node.alpha, node.sigma, node.dalpha, node.dsigma))
    p, q = conversion(stored, "sample", AlphaSigma(*values))
    if not bool(torch.isfinite(p) & torch.isfinite(q)):
        raise PlanError(f"a {stored} prediction at t={node.t:g} (alpha={node.alpha:g}) does not determine x0")
    return float(p), float(q)


def combine(terms: list[tuple[float, Tensor]], like: Tensor) -> Tensor:
    """Sum of coefficient * tensor in `like`'s dtype: one fresh accumulator, one in-place pass per term."""
    live = [(c, v) for c, v in terms if c != 0.0]
    if not live:
        return torch.zeros_like(like)
    (first, base), rest = live[0], live[1:]
    if first == 1.0 and rest:  # Euler and friends: x + h*v is a single pass
        total = torch.add(base, rest[0][1], alpha=rest[0][0])
        rest = rest[1:]
    else:
        total = base * first
    for coefficient, value in rest:
        total.add_(value, alpha=coefficient)
    return total


def run(
    program: Program,
    x: Tensor,
    evaluate: Evaluate,
    noise: Noise | None = None,
    mu: Tensor | None = None,
    add: Combine = combine,
) -> Iterator[StepResult]:
    """Run `program` from the state `x` (any shape), yielding after every step.

    evaluate(x, eval): the network; must return the program's stored kind, in x's shape (any float dtype).
    noise(slot): standard normal of x's shape, the same tensor for the same slot; each slot is asked for once.
    mu: the path's offset, needed only by mean-reverting programs.
    add: what sums up an update; `fused.fused_combine` does it in one pass over memory, which pays for large states.
    Raises PlanError if noise or mu is missing, ShapeError if a network output or noise has another shape.
    """
    return _answered(stepwise(program, x, noise, mu, add), evaluate)


def _answered(loop: Stepwise, evaluate: Evaluate) -> Iterator[StepResult]:
    item = next(loop, None)
    while item is not None:
        if isinstance(item, Ask):
            item = loop.send(evaluate(*item))  # never its end: a step's result follows
        else:
            yield item
            item = next(loop, None)


def stepwise(
    program: Program, x: Tensor, noise: Noise | None = None, mu: Tensor | None = None, add: Combine = combine
) -> Stepwise:
    """`run`, suspended wherever the network is needed: yields an `Ask`, which is answered with `send(output)`, and the
    result of every step, after which `next` goes on. Arguments and errors as `run`'s.

    For callers that run several programs in turn, with the network calls of all of them as one batch.
    """
    if not x.is_floating_point():
        raise ShapeError(f"the start state must be a floating-point tensor, got {x.dtype}")
    if program.noise_slots and noise is None:
        raise PlanError(f"this program draws noise in {len(program.noise_slots)} places; pass noise(slot) -> Tensor")
    if program.needs_offset and mu is None:
        raise PlanError("this program is for a path with an offset; pass mu, a tensor of x's shape")
    wide = torch.promote_types(x.dtype, torch.float32)
    return _stepwise(program, x.to(wide), noise, None if mu is None else mu.to(wide), add)


def _stepwise(program: Program, x: Tensor, noise: Noise | None, mu: Tensor | None, add: Combine) -> Stepwise:
    registers: dict[Register, Tensor] = {("x", 0): x}
    dead = iter(program.last_uses())
    estimate: _Estimate | None = None
    for index, step in enumerate(program.steps):
        for op in step:
            if isinstance(op, Eval):
                state = registers["x", op.state]
                output = yield Ask(state, op)
                if output is None:
                    raise PlanError(f"step {op.step} waits for the network's output; pass it with send(output)")
                value = _checked(output.value, state, "the network's output")
                registers["m", op.out] = value
                if op.out in program.variance_outputs:
                    if output.variance is None:
                        raise PlanError(f"step {op.step} uses a learned variance, but the network returned none")
                    registers["u", op.out] = _checked(output.variance, state, "the network's variance")
                estimate = _Estimate(op.node, program.stored, state, value, mu)
            else:
                for kind, slot in op.reads():
                    if kind == "z" and ("z", slot) not in registers and noise is not None:
                        registers["z", slot] = _checked(noise(slot), x, f"noise {slot}")
                registers["x", op.out] = latest = _lin(op, registers, x, mu, add)
                node = op.node
            for register in next(dead):
                registers.pop(register, None)
        yield StepResult(index, latest, node, estimate)


def _lin(op: Lin, registers: dict[Register, Tensor], like: Tensor, mu: Tensor | None, add: Combine = combine) -> Tensor:
    terms = [(c, registers["x", i]) for i, c in op.x]
    terms += [(c, registers["m", i]) for i, c in op.m]
    terms += [(c, registers["z", i]) for i, c in op.z]
    if op.mu != 0.0 and mu is not None:
        terms.append((op.mu, mu))
    total = add(terms, like)
    if op.learned is not None:
        total.addcmul_(_learned_scale(op.learned, registers["u", op.learned.output]), registers["z", op.learned.slot])
    return total


def _learned_scale(learned: LearnedNoise, code: Tensor) -> Tensor:
    """exp(log-variance / 2), interpolated in the log domain by the code u in [-1, 1] (not clamped, as
    official).
    """
    # (f*high + (1-f)*low)/2 with f = (u+1)/2  =  u*(high-low)/4 + (high+low)/4
    quarter = (learned.log_high + learned.log_low) / 4.0
    return torch.mul(code, (learned.log_high - learned.log_low) / 4.0).add_(quarter).exp_()


def _checked(value: Tensor, like: Tensor, what: str) -> Tensor:
    """`value` in the dtype of the state, or ShapeError: a silent broadcast would be a wrong sample."""
    if value.shape != like.shape:
        raise ShapeError(f"{what} has shape {tuple(value.shape)}, expected that of the state, {tuple(like.shape)}")
    return value if value.dtype == like.dtype else value.to(like.dtype)

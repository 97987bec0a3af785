"""Equality of solvers as equality of matrices, and the identities a compiled solver must satisfy (sheet D,
14.5).
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pliant.paths import AlphaSigma, conversion
from pliant.solvers.program import Eval, Lin, Node, Program


@dataclass(frozen=True)
class NormalForm:
    """Every state in terms of what enters from outside: `x_i = a_i x_start + C_i . m + S_i . z + L_i . l +
    b_i mu`.

    Row 0 is the start. a, b: (states,); c: (states, evaluations); s: (states, noise slots); learned: (states,
    learned noises), one column per learned-variance noise. All float64. `evaluated` lists the row each
    evaluation sees, `final` the row of the sample, `states` the register of each row.
    """

    a: Tensor
    c: Tensor
    s: Tensor
    b: Tensor
    learned: Tensor
    evaluated: tuple[int, ...]
    final: int
    states: tuple[int, ...]

    def rows(self) -> Tensor:
        """(evaluations + 1, columns): what every call sees, then the sample. Equal rows = the same solver."""
        table = torch.cat([self.a[:, None], self.c, self.s, self.learned, self.b[:, None]], dim=1)
        return table[[*self.evaluated, self.final]]


def normal_form(program: Program) -> NormalForm:
    """Eliminate the registers of `program` in order of execution. O(states * columns) memory, float64."""
    slots = {slot: k for k, slot in enumerate(program.noise_slots)}
    lins = [op for op in program.instructions() if isinstance(op, Lin)]
    learned = {op.out: k for k, op in enumerate(op for op in lins if op.learned is not None)}
    m0, z0 = 1, 1 + program.num_evaluations
    l0 = z0 + len(slots)
    mu0 = l0 + len(learned)
    table = torch.zeros(len(lins) + 1, mu0 + 1, dtype=torch.float64)
    table[0, 0] = 1.0
    row_of = {0: 0}
    evaluated: list[int] = []
    for op in program.instructions():
        if isinstance(op, Eval):
            evaluated.append(row_of[op.state])
            continue
        row = table[len(row_of)]  # a view: rows are filled in place
        for state, coefficient in op.x:
            row += coefficient * table[row_of[state]]
        for output, coefficient in op.m:
            row[m0 + output] += coefficient
        for slot, coefficient in op.z:
            row[z0 + slots[slot]] += coefficient
        if op.learned is not None:
            row[l0 + learned[op.out]] += 1.0
        row[mu0] += op.mu
        row_of[op.out] = len(row_of)
    return NormalForm(
        a=table[:, 0],
        c=table[:, m0:z0],
        s=table[:, z0:l0],
        b=table[:, mu0],
        learned=table[:, l0:mu0],
        evaluated=tuple(evaluated),
        final=row_of[program.final],
        states=tuple(row_of),
    )


def normal_form_of(scheduler: Any, double: bool = True, **options: Any) -> Tensor:
    """The rows of a diffusers scheduler, by running it on basis vectors: what every call sees, then its sample.

    scheduler, double, options: as in `walk`. Returns (calls+1, 1+calls+noises) float64: coefficients of the start, the
    outputs, the noises it drew. Compare with `NormalForm.rows()`; tables the scheduler keeps in float32 show as
    differences of 1e-4.
    """
    count = len(scheduler.timesteps)
    basis = torch.eye(1 + 3 * count, dtype=torch.float64)  # room for two noises per call
    rows, drawn = walk(scheduler, basis[: 1 + count], basis[1 + count :], double, **options)
    return rows[:, : 1 + count + drawn]


_STANDING_IN = threading.Lock()  # schedulers' modules are changed while they run


def walk(scheduler: Any, vectors: Tensor, noises: Tensor, double: bool = True, **options: Any) -> tuple[Tensor, int]:
    """What each call of a diffusers scheduler sees, and its sample, for given numbers; and how many noises it drew.

    scheduler: any object with `timesteps` (after `set_timesteps`) and `step(...).prev_sample`; a copy is run.
    vectors: (1 + calls, n), the start (as it is: not scaled) and the network's outputs. noises: (m, n), taken in turn
    where it draws. double: compute in float64, by standing in for `torch.float32` and the random functions in the
    scheduler's module while it runs. options: for `step`, e.g. DDIM's eta. Returns ((calls + 1, n) float64, count).
    """
    scheduler = copy.deepcopy(scheduler)
    drawn = 0
    # Schedulers expect a batch and channels.
    vectors, noises = vectors[:, None, None], noises[:, None, None]

    def draw(*_: Any, **__: Any) -> Tensor:
        nonlocal drawn
        drawn += 1
        return noises[drawn - 1]

    x, seen = vectors[0], []
    scale = getattr(scheduler, "scale_model_input", lambda sample, t: sample)
    with _STANDING_IN, _standing_in(sys.modules[type(scheduler).__module__], draw, double):
        for k, t in enumerate(scheduler.timesteps):
            seen.append(scale(x, t))
            x = scheduler.step(vectors[1 + k], t, x, **options).prev_sample
    return torch.stack([*seen, x]).double()[:, 0, 0], drawn


class _StandIn:
    """`torch` as a scheduler's module sees it: noise is a basis vector, float32 means float64 (they cast states)."""

    def __init__(self, draw: Callable[..., Tensor], double: bool) -> None:
        self.randn_like = draw
        if double:
            self.float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def _standing_in(module: ModuleType, draw: Callable[..., Tensor], double: bool) -> Iterator[None]:
    replaced: dict[str, Any] = {"randn_tensor": draw, "torch": _StandIn(draw, double)}
    originals = {name: getattr(module, name) for name in replaced if hasattr(module, name)}
    for name in originals:
        setattr(module, name, replaced[name])
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


class Residual(NamedTuple):
    """How far one Lin is from the path when fed a point of it: zero for a consistent exponential step.

    data, noise: error of the coefficients of x0 and eps at the Lin's node, for a constant x0 and eps
    (deterministic consistency). variance: `noise^2 + sum z^2 - sigma^2`, the marginal variance when x0 is
    known (stochastic steps in x0 form). state: the register; step: its step.
    """

    step: int
    state: int
    data: float
    noise: float
    variance: float


def consistency(program: Program) -> list[Residual]:
    """Residuals of every Lin without learned noise.

    If x0 and eps were constant, every state at node n would be alpha_n*x0 + sigma_n*eps and every output its
    own combination of the two. Solvers in x0 and eps (log-SNR or rho) are exact then; those in t on the
    straight path only; those in the angle never (they are exact for a constant v).
    """
    nodes: dict[int, Node] = {0: program.start}
    outputs: list[tuple[float, float]] = []
    found: list[Residual] = []
    for number, step in enumerate(program.steps):
        for op in step:
            if isinstance(op, Eval):
                outputs.append(_output_row(program, op.node))
                continue
            data = sum(c * nodes[i].alpha for i, c in op.x) + sum(c * outputs[j][0] for j, c in op.m)
            noise = sum(c * nodes[i].sigma for i, c in op.x) + sum(c * outputs[j][1] for j, c in op.m)
            spread = noise**2 + sum(c * c for _, c in op.z)
            nodes[op.out] = op.node
            if op.learned is None:
                variance = spread - op.node.sigma**2
                found.append(Residual(number, op.out, data - op.node.alpha, noise - op.node.sigma, variance))
    return found


def _output_row(program: Program, node: Node) -> tuple[float, float]:
    """The stored output as (coefficient of x0, coefficient of eps)."""
    s = AlphaSigma(*(torch.tensor(v, dtype=torch.float64) for v in (node.alpha, node.sigma, node.dalpha, node.dsigma)))
    # value = p*x + q*P for a kind P that is known exactly: take x0 where noise is small, eps where data is
    # small.
    if node.alpha >= node.sigma:
        p, q = (float(v) for v in conversion("epsilon", program.stored, s))
        return p * node.alpha, p * node.sigma + q
    p, q = (float(v) for v in conversion("sample", program.stored, s))
    return p * node.alpha + q, p * node.sigma

"""Gradients through sampling with memory that does not grow with the number of steps (AdjointDPM, sheet D, 11).

Two ways. `differentiable_run` is the exact discrete adjoint: the forward pass keeps only the state that each network
call saw (one latent per call; the network's activations are thousands of times larger), the backward pass walks the
program in reverse, transposes every linear update, and recomputes one call at a time under autograd. Its gradients are
those of plain autograd through the same program. `continuous_run` is the adjoint ODE of arXiv 2307.10711: it keeps the
final state only and integrates state, adjoint and parameter gradients backwards, exact up to the integration error.

Both return a tensor in the autograd graph: `loss(differentiable_run(...)).backward()` is all it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pliant.errors import PlanError, suggest
from pliant.paths import Path
from pliant.solvers.builder import nodes_of
from pliant.solvers.interpreter import Evaluate, Noise, run
from pliant.solvers.program import Eval, LearnedNoise, Lin, Node, Program, Register
from pliant.solvers.runge_kutta import TABLEAUS, Tableau

# The discrete adjoint ------------------------------------------------------------------------------------------------


def differentiable_run(
    program: Program,
    x: Tensor,
    evaluate: Evaluate,
    inputs: Sequence[Tensor] = (),
    noise: Noise | None = None,
    mu: Tensor | None = None,
    partial: bool = False,
) -> Tensor:
    """The final state of `program` (as `run`), with gradients for x, mu and `inputs`.

    evaluate: as in `run`, and differentiable; called once forward and once backward per evaluation, so it must answer
    the same both times. inputs: every tensor it depends on that should get a gradient: weights, a conditioning
    embedding. A call that depends on another leaf that requires grad raises PlanError (its gradient would silently be
    zero) unless `partial`. Memory: one state per evaluation and the activations of one call.
    """
    tape = _Tape(program, evaluate, tuple(inputs), noise, partial)
    final: Tensor = _Discrete.apply(tape, x, mu, *inputs)
    return final


class _Tape:
    """What the backward pass of one run needs: the closures, and per evaluation the state and the variance code."""

    def __init__(
        self, program: Program, evaluate: Evaluate, inputs: tuple[Tensor, ...], noise: Noise | None, partial: bool
    ) -> None:
        self.program = program
        self.evaluate = evaluate
        self.inputs = inputs
        self.noise = noise
        self.partial = partial
        self.states: dict[int, Tensor] = {}
        self.codes: dict[int, Tensor] = {}

    def forward(self, x: Tensor, mu: Tensor | None) -> Tensor:
        final = x
        for result in run(self.program, x, self._recorded, self.noise, mu):
            final = result.x
        return final

    def _recorded(self, x: Tensor, evaluation: Eval) -> Any:
        self.states[evaluation.out] = x.detach()
        output = self.evaluate(x, evaluation)
        if evaluation.out in self.program.variance_outputs and output.variance is not None:
            self.codes[evaluation.out] = output.variance.detach()
        return output

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """Gradients of (start state, offset, inputs) for the gradient of the final state."""
        adjoint: dict[Register, Tensor] = {("x", self.program.final): grad}
        offset: Tensor | None = None
        found: list[Tensor | None] = [None] * len(self.inputs)
        checked = self.partial
        for op in reversed(list(self.program.instructions())):
            if isinstance(op, Lin):
                above = adjoint.pop(("x", op.out), None)
                if above is None:
                    continue
                for register, coefficient in _terms(op):
                    _add(adjoint, register, above, coefficient)
                if op.mu != 0.0:
                    offset = above * op.mu if offset is None else offset.add_(above, alpha=op.mu)
                if op.learned is not None:
                    _add(adjoint, ("u", op.learned.output), self._learned(op.learned, above), 1.0)
            else:
                value, code = adjoint.pop(("m", op.out), None), adjoint.pop(("u", op.out), None)
                if value is None and code is None:
                    continue
                above_state = self._through_call(op, value, code, found, check=not checked)
                checked = True
                if above_state is not None:
                    _add(adjoint, ("x", op.state), above_state, 1.0)
        start = adjoint.get(("x", 0))
        return torch.zeros_like(grad) if start is None else start, offset, found

    def _through_call(
        self, op: Eval, value: Tensor | None, code: Tensor | None, found: list[Tensor | None], check: bool
    ) -> Tensor | None:
        """One recomputed call: adds to `found`, returns what flows into the state it saw."""
        state = self.states[op.out].requires_grad_()
        with torch.enable_grad():
            output = self.evaluate(state, op)
        pairs = [(o, g) for o, g in ((output.value, value), (output.variance, code)) if o is not None and g is not None]
        if not all(o.requires_grad for o, _ in pairs):
            raise PlanError("the network's output has no gradient: call it without no_grad and without detaching")
        if check:
            _refuse_unlisted([o for o, _ in pairs], (state, *self.inputs))
        wanted = [k for k, t in enumerate(self.inputs) if t.requires_grad]
        gradients = torch.autograd.grad(
            [o for o, _ in pairs],
            [state, *(self.inputs[k] for k in wanted)],
            [g.to(o.dtype) for o, g in pairs],
            allow_unused=True,
        )
        for k, g in zip(wanted, gradients[1:], strict=True):
            if g is not None:
                before = found[k]
                found[k] = g if before is None else before.add_(g)
        return gradients[0]

    def _learned(self, learned: LearnedNoise, above: Tensor) -> Tensor:
        """d/du of `exp((f*high + (1-f)*low)/2) * z`, f = (u+1)/2, times the gradient above."""
        assert self.noise is not None
        rate = (learned.log_high - learned.log_low) / 4.0
        u = self.codes[learned.output].to(above.dtype)
        scale = torch.exp(u * rate + (learned.log_high + learned.log_low) / 4.0)
        return above * scale * rate * self.noise(learned.slot).to(above)


def _terms(op: Lin) -> list[tuple[Register, float]]:
    return [(("x", i), c) for i, c in op.x] + [(("m", i), c) for i, c in op.m]


def _add(adjoint: dict[Register, Tensor], register: Register, value: Tensor, coefficient: float) -> None:
    """adjoint[register] += coefficient * value, never touching `value` itself."""
    before = adjoint.get(register)
    if before is None:
        adjoint[register] = value * coefficient
    else:
        before.add_(value.to(before.dtype), alpha=coefficient)


def _refuse_unlisted(outputs: Sequence[Tensor], listed: Sequence[Tensor]) -> None:
    """Raise PlanError if the outputs depend on leaves that require grad and are not listed."""
    known = {id(t) for t in listed}
    stop = {t.grad_fn for t in listed if t.grad_fn is not None}
    queue = [o.grad_fn for o in outputs if o.grad_fn is not None]
    seen: set[Any] = set(queue)
    missing: set[int] = set()
    while queue:
        function = queue.pop()
        leaf = getattr(function, "variable", None)
        if leaf is not None and id(leaf) not in known:
            missing.add(id(leaf))
        for parent, _ in function.next_functions:
            if parent is not None and parent not in seen and parent not in stop:
                seen.add(parent)
                queue.append(parent)
    if missing:
        raise PlanError(
            f"the network depends on {len(missing)} tensors that require gradients but are not in `inputs`, so their "
            f"gradients would be missing; list them, freeze them, or pass partial=True"
        )


class _Discrete(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tape: _Tape, x: Tensor, mu: Tensor | None, *inputs: Tensor) -> Tensor:
        ctx.tape, ctx.kinds = tape, (x.dtype, None if mu is None else mu.dtype)
        final = tape.forward(x, mu)
        return final.clone() if final is x else final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        start, offset, found = ctx.tape.backward(grad)
        kind, offset_kind = ctx.kinds
        return (None, start.to(kind), None if offset is None else offset.to(offset_kind), *found)


# The continuous adjoint ----------------------------------------------------------------------------------------------

Epsilon: TypeAlias = Callable[[Tensor, Node], Tensor]
"""eps(x, node): the network's noise prediction at a state of the path."""


def continuous_run(
    path: Path,
    times: Sequence[float] | Tensor,
    x: Tensor,
    epsilon: Epsilon,
    inputs: Sequence[Tensor] = (),
    method: str = "rk4",
) -> Tensor:
    """The probability-flow ODE from times[0] to times[-1] as `dy/drho = eps`, y = x/alpha, rho = sigma/alpha.

    Gradients for x and `inputs` come from the adjoint ODE on the same grid, backwards: nothing is kept but the final
    state, whatever the number of steps. They agree with the discrete ones up to the integration error, and the state
    that is re-integrated drifts where the ODE is stiff; `differentiable_run` is the default for that reason.
    method: one of `TABLEAUS`. Raises PlanError for a grid that starts where alpha is 0.
    """
    if method not in TABLEAUS:
        raise PlanError(f"unknown method {method!r}: {suggest(method, TABLEAUS)}")
    grid = [float(t) for t in times]
    if any(n.alpha == 0.0 for n in nodes_of(path, [grid[0], grid[-1]])):
        raise PlanError("the adjoint ODE needs alpha > 0 at both ends; start slightly inside, e.g. at t = 0.999")
    ode = _Flow(path, grid, epsilon, tuple(inputs), TABLEAUS[method])
    final: Tensor = _Continuous.apply(ode, x, *inputs)
    return final


class _Flow:
    """The ODE and its adjoint on one grid. Quantities: y (state over alpha), a = dL/dy, g = dL/dinputs."""

    def __init__(
        self, path: Path, times: list[float], epsilon: Epsilon, inputs: tuple[Tensor, ...], method: Tableau
    ) -> None:
        self.epsilon = epsilon
        self.inputs = inputs
        self.method = method
        nodes = nodes_of(path, times)
        self.first, self.last = nodes[0], nodes[-1]
        rho = [n.sigma / n.alpha for n in nodes]
        # Every stage's node, computed at once: forward from rho[k] to rho[k+1], backward from rho[k+1] to rho[k].
        self.steps = [b - a for a, b in pairwise(rho)]
        stages = [a + c * h for a, h in zip(rho, self.steps, strict=False) for c in method.c]
        back = [b - c * h for b, h in zip(rho[1:], self.steps, strict=False) for c in method.c]
        ratios = torch.tensor([*stages, *back], dtype=torch.float64)
        flat = nodes_of(path, path.time_of_noise_ratio(ratios).tolist())
        width = len(method.c)
        rows = [flat[i : i + width] for i in range(0, len(flat), width)]
        self.forward_nodes, self.backward_nodes = rows[: len(self.steps)], rows[len(self.steps) :]

    def forward(self, x: Tensor) -> Tensor:
        y = x / self.first.alpha
        for h, nodes in zip(self.steps, self.forward_nodes, strict=True):
            slopes: list[Tensor] = []
            for row, node in zip(self.method.a, nodes, strict=True):
                seen = _stepped(y, h, row, slopes)
                slopes.append(self.epsilon(node.alpha * seen, node).to(y.dtype))
            y = _stepped(y, h, self.method.b, slopes)
        return y * self.last.alpha

    def backward(self, final: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        wanted = [t for t in self.inputs if t.requires_grad]
        y, a = final / self.last.alpha, grad * self.last.alpha
        found = [torch.zeros_like(t) for t in wanted]
        for h, nodes in zip(reversed(self.steps), reversed(self.backward_nodes), strict=True):
            slopes_y: list[Tensor] = []
            slopes_a: list[Tensor] = []
            for row, b, node in zip(self.method.a, self.method.b, nodes, strict=True):
                # Backwards: the step is -h.
                at_y, at_a = _stepped(y, -h, row, slopes_y), _stepped(a, -h, row, slopes_a)
                slope_y, slope_a, slopes = self._slopes(at_y, at_a, node, wanted)
                slopes_y.append(slope_y)
                slopes_a.append(slope_a)
                for total, slope in zip(found, slopes, strict=True):
                    if slope is not None:
                        total.add_(slope, alpha=-h * b)
            y, a = _stepped(y, -h, self.method.b, slopes_y), _stepped(a, -h, self.method.b, slopes_a)
        given = iter(found)
        return a / self.first.alpha, [next(given) if t.requires_grad else None for t in self.inputs]

    def _slopes(
        self, y: Tensor, a: Tensor, node: Node, wanted: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """d/drho of y, a and g: eps, -a^T d eps/dy, -a^T d eps/dinputs."""
        leaf = y.detach().requires_grad_()
        with torch.enable_grad():
            value = self.epsilon(node.alpha * leaf, node)
        if not value.requires_grad:
            raise PlanError("the network's output has no gradient: call it without no_grad and without detaching")
        gradients = torch.autograd.grad(value, [leaf, *wanted], a.to(value.dtype), allow_unused=True)
        on_state = torch.zeros_like(y) if gradients[0] is None else gradients[0]
        return value.detach().to(y.dtype), -on_state, [None if g is None else -g for g in gradients[1:]]


def _stepped(base: Tensor, h: float, row: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """base + h * sum row_j slope_j."""
    total = base
    for weight, slope in zip(row, slopes, strict=True):
        if weight != 0.0:
            total = total + (h * weight) * slope
    return total


class _Continuous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ode: _Flow, x: Tensor, *inputs: Tensor) -> Tensor:
        final = ode.forward(x)
        ctx.ode = ode
        ctx.save_for_backward(final)
        return final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        start, found = ctx.ode.backward(ctx.saved_tensors[0], grad)
        return (None, start, *found)

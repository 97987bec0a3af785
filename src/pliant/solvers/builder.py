"""Writes programs: what a solver's `emit` talks to.

The builder knows the nodes of the grid, numbers the registers, keeps the history of network outputs together
with the states they were evaluated at, and folds the conversion from the stored prediction kind into the
coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch

from pliant.errors import PlanError
from pliant.paths import AlphaSigma, Path, PredictionType, conversion, prediction_type
from pliant.solvers.coefficients import get_form, order_allowed, step_weights
from pliant.solvers.fits import Fit
from pliant.solvers.program import Eval, Instruction, LearnedNoise, Lin, Node, Program, Terms

_HISTORY = 6  # outputs remembered; no multistep rule uses more


@dataclass(frozen=True)
class Stored:
    """A network output: register `out`, evaluated at `node` on register `state` (never a corrected one)."""

    out: int
    node: Node
    state: int


@dataclass(frozen=True)
class Virtual:
    """A combination of outputs that stands for an output at `node` (DC-Solver): coefficients, no tensor.

    The parts are combined in whatever prediction kind a step uses them.
    """

    node: Node
    parts: tuple[tuple[float, Stored], ...]


Held: TypeAlias = Stored | Virtual


@dataclass(frozen=True)
class Row:
    """A prediction as a row over registers: `p * x[state] + q * m[out] + mu * offset`."""

    state: int
    out: int
    p: float
    q: float
    mu: float


def nodes_of(path: Path, times: Iterable[float]) -> list[Node]:
    """The path's nodes at these times, computed in one vectorised call. Float64."""
    t = torch.tensor(list(times), dtype=torch.float64)
    columns = [t, *path.alpha_sigma(t)]
    if offset := getattr(path, "offset", None):
        columns.append(offset(t))
    return [Node(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


class ProgramBuilder:
    """Collects the instructions of one program.

    path, times: the grid, steps+1 times in the order of sampling. stored: the kind the network's outputs
    have. variance: whether evaluations also give a variance code. Attributes for solvers: `nodes` (one per
    time), `state` (register of the current state), `trail` (register of the state at each grid node so far),
    `history` (outputs at grid nodes, newest first), `increasing` (inversion).
    """

    def __init__(self, path: Path, times: Sequence[float], stored: PredictionType, variance: bool = False) -> None:
        self.path = path
        self.stored = prediction_type(stored)
        self.variance = variance
        self.nodes = nodes_of(path, times)
        self.history: list[Held] = []
        self.state = 0
        self.trail = [0]
        self.increasing = self.nodes[-1].t > self.nodes[0].t
        self._states = 1
        self._outputs = 0
        self._slots = 0
        self._steps: list[tuple[Instruction, ...]] = []
        self._labels: list[str] = []
        self._current: list[Instruction] = []
        # Nodes come in families (the grid, the inner nodes of one stage) whose tensor work is done in one call each.
        self._families: list[list[Node]] = []
        self._places: dict[Node, tuple[int, int]] = {}
        self._conversions: dict[tuple[int, PredictionType], tuple[list[float], list[float]]] = {}
        self._inner: dict[tuple[str, float], list[Node]] = {}
        self._add_family(self.nodes)

    # -------------------------------------------------------------------------------------------- for solvers

    @property
    def steps(self) -> int:
        """Number of steps of the grid."""
        return len(self.nodes) - 1

    def node(self, t: float) -> Node:
        """A node off the grid (a stage of a singlestep method); for grid times use the shared `nodes`."""
        return nodes_of(self.path, [t])[0]

    def inner(self, i: int, form: str, share: float) -> Node:
        """The node at `share` of step i in the form's variable (the stages of singlestep and Runge-Kutta methods).

        Computed for all steps at once when first asked for. A step that is infinite in the variable has none; solvers
        ask `span` first.
        """
        key = (form, share)
        if key not in self._inner:
            rule = get_form(form)
            u = [rule.variable(n) for n in self.nodes]
            values = [a + share * (b - a) for a, b in pairwise(u)]
            safe = [v if math.isfinite(v) else next((w for w in u if math.isfinite(w)), 0.0) for v in values]
            self._inner[key] = nodes_of(self.path, rule.time(self.path, torch.tensor(safe, dtype=torch.float64)))
            self._add_family(self._inner[key])
        return self._inner[key][i]

    def node_at(self, form: str, value: float) -> Node:
        """The node where the form's variable has this value; beyond the path's ends, the end."""
        place = torch.tensor([value], dtype=torch.float64)
        return nodes_of(self.path, get_form(form).time(self.path, place))[0]

    def span(self, form: str, source: Node, target: Node) -> float:
        """Length of a step in the form's variable: infinite at the ends of most paths."""
        variable = get_form(form).variable
        return variable(target) - variable(source)

    def output(self, i: int) -> Held:
        """The output at grid node i, on the current state unless the history already has one for this node.

        (Correctors evaluate the next node ahead of time.) It joins the history.
        """
        if not self.history or self.history[0].node is not self.nodes[i]:
            self.remember(self.evaluate(self.nodes[i]))
        return self.history[0]

    def evaluate(
        self, node: Node, state: int | None = None, ahead: bool = False, lands: float | None = None
    ) -> Stored:
        """Emit a network call at `node` on a state register (default: the current state).

        ahead: the call is the next step's first one, taken early by a corrector: that step says what it may cost.
        lands: house time of the jump's end, for flow maps.
        """
        stored = Stored(self._outputs, node, self.state if state is None else state)
        self._current.append(Eval(stored.out, stored.state, node, step=len(self._steps) + ahead, lands=lands))
        self._outputs += 1
        return stored

    def remember(self, stored: Held) -> None:
        """Make an output available to multistep rules of later steps."""
        self.history.insert(0, stored)
        del self.history[_HISTORY:]

    def compensate(self, ratio: float, degree: int) -> None:
        """DC-Solver (arXiv 2409.03755): replace the newest output by the history's polynomial at another time.

        The polynomial of `degree` in t through the newest degree+1 outputs is taken at `ratio*t_0 + (1-ratio)*t_1`; 1
        changes nothing. Later steps use the replacement too.
        """
        if ratio == 1.0 or len(self.history) <= degree:
            return
        used = self.history[: degree + 1]
        times = [o.node.t for o in used]
        at = ratio * times[0] + (1.0 - ratio) * times[1]
        parts: dict[Stored, float] = {}
        for a, output in enumerate(used):
            share = math.prod((at - v) / (times[a] - v) for b, v in enumerate(times) if b != a)
            for inner, stored in output.parts if isinstance(output, Virtual) else ((1.0, output),):
                parts[stored] = parts.get(stored, 0.0) + share * inner
        self.history[0] = Virtual(used[0].node, tuple((c, s) for s, c in parts.items()))

    def noise(self) -> int:
        """A fresh noise slot."""
        self._slots += 1
        return self._slots - 1

    def convert(self, stored: Stored, kind: PredictionType) -> Row:
        """An output as another prediction kind, at the state it was evaluated at.

        Raises PlanError where the kind is not determined.
        """
        p, q = self._conversion(stored.node, kind)
        if not (math.isfinite(p) and math.isfinite(q)):
            n = stored.node
            raise PlanError(
                f"at t={n.t:g} (alpha={n.alpha:g}, sigma={n.sigma:g}) a {self.stored} prediction does "
                f"not determine {kind}; start slightly inside, e.g. at t={min(max(n.t, 1e-3), 1 - 1e-3):g}"
            )
        if n_beta := stored.node.beta:
            self._refuse_velocity_with_offset(kind)
            return Row(stored.state, stored.out, p, q, -p * n_beta)
        return Row(stored.state, stored.out, p, q, 0.0)

    def rows(self, weight: float, output: Held, kind: PredictionType) -> list[tuple[float, Row]]:
        """`weight` times an output, as terms for `combine_rows`; several for a virtual output."""
        parts = output.parts if isinstance(output, Virtual) else ((1.0, output),)
        return [(weight * share, self.convert(stored, kind)) for share, stored in parts]

    def transfer(
        self,
        form: str,
        target: Node,
        outputs: Sequence[Held],
        *,
        base: tuple[int, Node],
        fit: str | Fit = "lagrange",
        depth: float = 0.0,
    ) -> int:
        """Emit the step of `form` from `base` (register, node) to `target` through `outputs` (newest first).

        depth: amount of fresh noise (`depth_of_eta`, `depth_of_tau`); 0 is the ODE. Returns the new state
        register.
        """
        rule = get_form(form)
        register, source = base
        step, weights = step_weights(rule, source, target, [o.node for o in outputs], fit, depth)
        mu = target.beta - step.a * source.beta
        if mu != 0.0:
            self._refuse_velocity_with_offset(rule.kind)
        rows = [row for w, o in zip(weights, outputs, strict=True) for row in self.rows(w, o, rule.kind)]
        z = {self.noise(): step.noise} if step.noise != 0.0 else {}
        return self.combine_rows(target, {register: step.a}, rows, z=z, mu=mu)

    def combine_rows(
        self,
        target: Node,
        x: Mapping[int, float],
        rows: Sequence[tuple[float, Row]],
        *,
        z: Mapping[int, float] | None = None,
        mu: float = 0.0,
        learned: LearnedNoise | None = None,
    ) -> int:
        """Emit `sum x-terms + sum coefficient * converted output + ...` as a new state at `target`."""
        states, outputs = dict(x), dict[int, float]()
        for coefficient, row in rows:
            states[row.state] = states.get(row.state, 0.0) + coefficient * row.p
            outputs[row.out] = outputs.get(row.out, 0.0) + coefficient * row.q
            mu += coefficient * row.mu
        return self.combine(target, x=states, m=outputs, z=z, mu=mu, learned=learned)

    def combine(
        self,
        target: Node,
        *,
        x: Mapping[int, float] | None = None,
        m: Mapping[int, float] | None = None,
        z: Mapping[int, float] | None = None,
        mu: float = 0.0,
        learned: LearnedNoise | None = None,
    ) -> int:
        """Emit a raw linear combination as a new state at `target`; returns its register.

        Zero coefficients are dropped.
        """
        out = self._states
        self._states += 1
        self._current.append(Lin(out, target, _terms(x), _terms(m), _terms(z), mu, learned))
        return out

    def advance(self, state: int) -> None:
        """Make `state` the current one: where the next step starts."""
        self.state = state
        self.trail.append(state)

    def usable(self, form: str, source: Node, target: Node, order: int) -> list[Held]:
        """The newest outputs of the history, at most `order`, that a step of `form` can interpolate."""
        nodes = [s.node for s in self.history[:order]]
        return self.history[: min(order, order_allowed(get_form(form), source, target, nodes))]

    # --------------------------------------------------------------------------------------- for the compiler

    def close_step(self, label: str) -> None:
        """End the current step; what follows belongs to the next."""
        self._steps.append(tuple(self._current))
        self._labels.append(label)
        self._current = []

    def finish(self) -> Program:
        """The program so far; the current state is the sample."""
        return Program(
            path=self.path.to_config(),
            stored=self.stored,
            steps=tuple(self._steps),
            start=self.nodes[0],
            end=self.nodes[-1],
            final=self.state,
            labels=tuple(self._labels),
        )

    def _add_family(self, nodes: list[Node]) -> None:
        self._places.update((node, (len(self._families), k)) for k, node in enumerate(nodes))
        self._families.append(nodes)

    def _conversion(self, node: Node, kind: PredictionType) -> tuple[float, float]:
        place = self._places.get(node)
        if place is None:
            p, q = self._conversion_rows([node], kind)
            return p[0], q[0]
        family, k = place
        if (family, kind) not in self._conversions:
            self._conversions[family, kind] = self._conversion_rows(self._families[family], kind)
        p, q = self._conversions[family, kind]
        return p[k], q[k]

    def _conversion_rows(self, nodes: Sequence[Node], kind: PredictionType) -> tuple[list[float], list[float]]:
        rows = torch.tensor([[n.alpha, n.sigma, n.dalpha, n.dsigma] for n in nodes], dtype=torch.float64)
        p, q = conversion(self.stored, kind, AlphaSigma(*rows.unbind(1)))
        return p.tolist(), q.tolist()

    def _refuse_velocity_with_offset(self, kind: PredictionType) -> None:
        moving = {"velocity", "v_prediction"} & {kind, self.stored}
        if moving:
            raise PlanError(
                f"on a path with an offset {moving.pop()} is ambiguous; store and integrate epsilon or sample"
            )


def _terms(coefficients: Mapping[int, float] | None) -> Terms:
    return tuple(sorted((i, c) for i, c in (coefficients or {}).items() if c != 0.0))

"""A sampler's coefficients by least squares to a teacher: OLSS (arXiv 2305.14677; sheet D, 5 and 14.5).

Every explicit linear sampler writes its next state as a combination of the start and all outputs so far. OLSS takes
the combination that is nearest to the teacher's state. Here with three remedies for its known weakness (late columns
are nearly parallel, so free coefficients are large and explode on new samples): the fit is on-policy, each step on the
states that the fitted steps before it make; it is exact for straight trajectories (constraints); and it is pulled
towards a named solver's step (ridge).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pliant.errors import PlanError
from pliant.paths import AlphaSigma, PredictionType
from pliant.paths.predictions import row
from pliant.planning.dynamic_programming import Route
from pliant.planning.teacher import Trajectories
from pliant.solvers import Node, Rows
from pliant.solvers.rows import MEMORY

Outputs = Callable[[Tensor, int], Tensor]
"""(states (N, ...), place in the grid) -> the network's outputs, in its own kind."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """Rows, one per step, and the mean squared distance to the teacher after every step."""

    steps: tuple[Rows, ...]
    errors: tuple[float, ...]


def straight(stored: PredictionType, node: Node) -> tuple[float, float]:
    """(p, q): an output of this kind at a node is p*x0 + q*eps."""
    at = AlphaSigma(*(torch.tensor(v, dtype=torch.float64) for v in (node.alpha, node.sigma, node.dalpha, node.dsigma)))
    p, q = row(stored, at)
    return float(p), float(q)


def constrained_fit(
    columns: Tensor, target: Tensor, equalities: Tensor, values: Tensor, near: Tensor, ridge: float
) -> Tensor:
    """Coefficients c (n,) that minimise |columns c - target|^2 + g |c - near|^2 subject to equalities c = values.

    columns: (rows, n); target: (rows,); equalities: (k, n) of full rank; near: (n,). g = ridge * tr(columns^T
    columns) / n. Solved in the null space of the equalities, in float64.
    """
    a, b = columns.to(torch.float64), target.to(torch.float64)
    n = a.shape[1]
    particular = torch.linalg.lstsq(equalities, values[:, None], driver="gelsd").solution[:, 0]
    _, s, vh = torch.linalg.svd(equalities)
    free = vh[int((s > 1e-12 * s[0]).sum()) :].T
    if free.shape[1] == 0:
        return particular
    g = (ridge * float(a.square().sum()) / n) ** 0.5
    left = torch.cat([a @ free, g * free])
    right = torch.cat([b - a @ particular, g * (near - particular)])
    return particular + free @ torch.linalg.lstsq(left, right[:, None], driver="gelsd").solution[:, 0]


def fit_rows(
    outputs: Outputs,
    nodes: Sequence[Node],
    places: Sequence[int],
    start: Tensor,
    targets: Sequence[Tensor],
    stored: PredictionType,
    ridge: float = 1e-6,
    memory: int = MEMORY,
) -> Fitted:
    """One `Rows` step per pair of places, each fitted to `targets` (the teacher after every step).

    start: (N, ...) at places[0]. Regressors: the current state and the newest `memory` outputs; while there are no more
    of them this spans OLSS's own (the start and all outputs). ridge: towards the first-order step, relative to the mean
    square of the regressors. One call per step. Raises PlanError for a wrong number of targets.
    """
    if len(targets) != len(places) - 1:
        raise PlanError(f"{len(places) - 1} steps need as many targets, got {len(targets)}")
    x, seen, rows, errors = start, list[tuple[Tensor, Node]](), list[Rows](), list[float]()
    for (here, there), goal in zip(pairwise(places), targets, strict=True):
        s, t = nodes[here], nodes[there]
        seen.insert(0, (outputs(x, here), s))
        del seen[min(memory, MEMORY) :]
        kinds = [(s.alpha, s.sigma), *(straight(stored, node) for _, node in seen)]
        equalities = torch.tensor(kinds, dtype=torch.float64).T
        columns = torch.stack([x.reshape(-1), *(m.reshape(-1) for m, _ in seen)], 1)
        near = torch.zeros(len(kinds), dtype=torch.float64)
        near[:2] = torch.linalg.solve(equalities[:, :2], torch.tensor([t.alpha, t.sigma], dtype=torch.float64))
        values = torch.tensor([t.alpha, t.sigma], dtype=torch.float64)
        c = constrained_fit(columns, goal.reshape(-1), equalities, values, near, ridge)
        x = (columns.to(torch.float64) @ c).reshape(x.shape).to(x.dtype)
        rows.append(Rows(stages=(((float(c[0]),), tuple(c[1:].tolist()), ()),)))
        errors.append(float((x - goal).double().square().mean()))
    return Fitted(tuple(rows), tuple(errors))


def subspace_path(teacher: Trajectories, outputs: Tensor, steps: int, trials: int = 30) -> Route:
    """OLSS's path: the places for which the worst one-step projection error is least.

    outputs: (M, N, ...) at the teacher's states. A step from place i may combine the teacher's state there and the
    outputs of all places on the path. For a tolerance the furthest affordable place is taken each time, found by
    bisection; the least tolerance that arrives within `steps` is found by bisection too.
    """
    last = len(teacher.nodes) - 1
    if not 1 <= steps <= last:
        raise PlanError(f"a path through {last + 1} nodes has between 1 and {last} steps, not {steps}")
    states = teacher.states.double().flatten(1)
    given = outputs.double().flatten(1)
    known: dict[tuple[int, ...], Tensor] = {}

    def error(way: tuple[int, ...], there: int) -> float:
        if way not in known:
            basis = torch.stack([states[way[-1]], *(given[k] for k in way)], 1)
            known[way] = torch.linalg.qr(basis)[0]
        rest = states[there] - known[way] @ (known[way].T @ states[there])
        return float(rest.square().mean())

    def path(tolerance: float) -> tuple[int, ...] | None:
        way: tuple[int, ...] = (0,)
        while way[-1] < last:
            if len(way) > steps:
                return None
            low, high = way[-1] + 1, last
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if error(way, middle) <= tolerance else (low, middle - 1)
            way = (*way, low)
        return way if len(way) == steps + 1 else _lengthened(way, steps)

    high = max(error((0,), last), 1e-12)
    low, best = 0.0, path(high)
    for _ in range(trials):
        middle = 0.5 * (low + high)
        found = path(middle)
        low, high, best = (low, middle, found) if found is not None else (middle, high, best)
    assert best is not None  # one step is affordable at its own error
    worst = max(error(best[: k + 1], best[k + 1]) for k in range(steps))
    return Route(best, (0,) * steps, worst)


def _lengthened(way: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """A path that arrives early, with its longest gaps halved until it has `steps` steps."""
    places = list(way)
    while len(places) <= steps:
        gap, k = max((b - a, -k) for k, (a, b) in enumerate(pairwise(places)))
        places.insert(-k + 1, places[-k] + gap // 2)
    return tuple(places)

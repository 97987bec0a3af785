"""First- and second-order steps on clean-data estimates: what planners of times propagate.

Exactly the arithmetic of the solvers "ddim" and "dpmpp-2m", without compiling a program per candidate grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from pliant.errors import PlanError
from pliant.planning.field import Field
from pliant.planning.teacher import Trajectories
from pliant.solvers import Node
from pliant.solvers.coefficients import get_form, order_allowed, step_weights

SOLVER_OF_ORDER = {1: "ddim", 2: "dpmpp-2m"}


@dataclass(frozen=True, eq=False)
class Point:
    """Where a sampler is: states (N, ...) at a node, and the newest earlier estimate with its node."""

    x: Tensor
    node: Node
    clean: Tensor | None = None
    before: Node | None = None

    def step(self, clean: Tensor, target: Node, order: int = 1) -> Point:
        """One step with the estimate made here. order 2 also uses the earlier one, where the path allows it."""
        older = () if order == 1 or self.clean is None or self.before is None else (self.before,)
        keep, weights = _weights(self.node, target, older)
        x = keep * self.x + weights[0] * clean
        if len(weights) == 2:
            x = torch.add(x, self.clean, alpha=weights[1])  # type: ignore[arg-type]
        return Point(x, target, clean, self.node)


@lru_cache(maxsize=200_000)
def _weights(s: Node, t: Node, older: tuple[Node, ...]) -> tuple[float, list[float]]:
    form = get_form("sample")
    nodes = [s, *older]
    count = 1 if t.sigma == 0.0 else order_allowed(form, s, t, nodes)
    step, weights = step_weights(form, s, t, nodes[:count], "midpoint")
    return step.a, weights


def check_order(order: int) -> None:
    if order not in SOLVER_OF_ORDER:
        raise PlanError(f"planners of times propagate steps of order 1 (ddim) or 2 (dpmpp-2m), got {order}")


def walk(field: Field, x: Tensor, places: Sequence[int], modes: Sequence[int] | None = None, order: int = 1) -> Tensor:
    """States (N, ...) after going through these nodes, in these modes (default: all 0)."""
    point = Point(x, field.nodes[places[0]])
    for k, (here, there) in enumerate(pairwise(places)):
        clean = field(point.x, here, 0 if modes is None else modes[k])
        # The last of few steps is of first order, as in "dpmpp-2m".
        last = k == len(places) - 2 and len(places) - 1 < 15
        point = point.step(clean, field.nodes[there], 1 if last else order)
    return point.x


def trajectories_of(field: Field, x: Tensor, mode: int = 0, order: int = 1) -> Trajectories:
    """The trajectory through every node of a field, as a teacher."""
    point, states, clean = Point(x, field.nodes[0]), [x], []
    for place in range(len(field.nodes) - 1):
        clean.append(field(point.x, place, mode))
        point = point.step(clean[-1], field.nodes[place + 1], order)
        states.append(point.x)
    return Trajectories(field.nodes, torch.stack(states), torch.stack(clean))


def mean_square(a: Tensor, b: Tensor) -> float:
    """Mean over samples and elements of the squared difference."""
    return float((a - b).double().square().mean())

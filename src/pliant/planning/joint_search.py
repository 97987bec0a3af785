"""Times and compute together: a path through (time node, mode), with the student's own state, under a price.

The problem nobody seems to have published a search for (sheet H, 8, last item): which times, and how much network at
each. Every node keeps the state of the best way to reach it, as OptimalSteps does, but "best" is a Lagrangian, error +
multiplier * money, so that a way may be cheaper instead of nearer. Bisection on the multiplier finds the money that is
wanted; of all complete ways met meanwhile the nearest affordable one is taken, which fills what the multiplier, whose
ways lie on a convex hull, leaves over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from pliant.errors import PlanError
from pliant.planning.dynamic_programming import Route
from pliant.planning.field import Field
from pliant.planning.stepping import Point, mean_square
from pliant.planning.teacher import Trajectories

Way = tuple[tuple[int, ...], tuple[int, ...]]
"""Places so far, and the mode of every step between them."""


class JointSearch:
    """One problem, to be swept with several multipliers; `calls` counts those made, on N samples each."""

    def __init__(
        self,
        field: Field,
        teacher: Trajectories,
        price: Sequence[float],
        order: int = 1,
        phases: Sequence[int] = (),
        weight: Tensor | None = None,
    ) -> None:
        """price: of one step, per mode. order: of the steps. phases: modes may only change to the same or a higher
        phase (weak first: 0 for weak modes, 1 for powerful ones); default: any order. weight: (M+1,), how much an error
        at a node counts (`growth` says how much of it arrives); default: 1."""
        self.field, self.teacher, self.price, self.order = field, teacher, tuple(price), order
        self.phases = tuple(phases) or (0,) * len(self.price)
        if len(self.phases) != len(self.price) or not all(p > 0 for p in self.price):
            raise PlanError(f"{len(self.price)} modes need as many phases, and prices above 0, got {list(self.price)}")
        self._weight = [1.0] * len(field.nodes) if weight is None else weight.tolist()
        self._known: dict[tuple[Way, int], Tensor] = {}
        self.calls = 0

    def money(self, route: Route) -> float:
        return sum(self.price[mode] for mode in route.modes)

    def sweep(self, multiplier: float) -> tuple[Route, list[Route]]:
        """The way to the end with the least error + multiplier * money, and every other complete way met.

        A node keeps one way per phase reached. Calls: about M * modes.
        """
        nodes, last = self.field.nodes, len(self.field.nodes) - 1
        kept: dict[tuple[int, int], tuple[float, float, Point, Way]] = {}
        kept[0, min(self.phases)] = (0.0, 0.0, Point(self.teacher.states[0], nodes[0]), ((0,), ()))
        ends: list[Route] = []
        best: tuple[float, Route] | None = None
        levels = sorted(set(self.phases))
        for i in range(last):
            for level in levels:
                if (i, level) not in kept:
                    continue
                _, money, point, way = kept[i, level]
                for mode, each in enumerate(self.price):
                    phase = self.phases[mode]
                    if phase < level:
                        continue
                    clean = self._call(point, way, mode)
                    for j in range(i + 1, last + 1):
                        there = point.step(clean, nodes[j], 1 if j == last else self.order)
                        error = mean_square(there.x, self.teacher.states[j])
                        total = self._weight[j] * error + multiplier * (money + each)
                        if j == last:
                            route = Route((*way[0], j), (*way[1], mode), error)
                            ends.append(route)
                            if best is None or total < best[0]:
                                best = (total, route)
                        elif total < kept.get((j, phase), (math.inf,))[0]:
                            kept[j, phase] = (total, money + each, there, ((*way[0], j), (*way[1], mode)))
        assert best is not None  # node 0 reaches the end in one step
        return best[1], ends

    def within(
        self, limit: float, sweeps: int = 8, report: Callable[[int, int, str], None] | None = None
    ) -> list[Route]:
        """Complete ways that cost at most `limit`, the nearest to the teacher first, after bisection on the multiplier.

        Raises PlanError if not even one step is affordable.
        """
        if min(self.price) > limit:
            raise PlanError(f"one step costs at least {min(self.price):g}, more than the limit of {limit:g}")
        found: dict[Way, Route] = {}
        # The first guess: the error of one step for the money of one step, which is far too much.
        high = self._one_step_error() / min(self.price)
        low = high * 1e-8
        for k in range(sweeps):
            multiplier = math.sqrt(low * high)
            route, ends = self.sweep(multiplier)
            money = self.money(route)
            for end in ends:
                if self.money(end) <= limit:
                    found[end.places, end.modes] = end
            if report is not None:
                report(k + 1, sweeps, f"multiplier {multiplier:.2g}, money {money / limit:.0%} of the limit")
            if money > limit:
                low = multiplier
            else:
                high = multiplier
                if limit - money < min(self.price):
                    break
        return sorted(found.values(), key=lambda route: route.value)

    def _one_step_error(self) -> float:
        start = Point(self.teacher.states[0], self.field.nodes[0])
        clean = self._call(start, ((0,), ()), len(self.price) - 1)
        return mean_square(start.step(clean, self.field.nodes[-1]).x, self.teacher.states[-1])

    def _call(self, point: Point, way: Way, mode: int) -> Tensor:
        key = (way, mode)
        if key not in self._known:
            self._known[key] = self.field(point.x, way[0][-1], mode)
            self.calls += 1
        return self._known[key]


def weak_first(prices: Sequence[float]) -> tuple[int, ...]:
    """Phases that let the price per step only grow."""
    order = sorted(set(prices))
    return tuple(order.index(p) for p in prices)

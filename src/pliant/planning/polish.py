"""Small changes to a route that bring its end nearer to the teacher's: what dynamic programming left on the table.

Propagation keeps one way per node, and the nearest state half-way need not lead to the nearest end. Here whole routes
are compared by their end: places move, modes change, steps come and go, within the same money.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pliant.planning.dynamic_programming import Route
from pliant.planning.field import Field
from pliant.planning.stepping import Point, mean_square
from pliant.planning.teacher import Trajectories


class Walker:
    """End errors of routes; ways that begin alike share their calls."""

    def __init__(self, field: Field, teacher: Trajectories, order: int) -> None:
        self.field, self.teacher, self.order = field, teacher, order
        self.calls = 0
        self._clean: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}

    def error(self, places: Sequence[int], modes: Sequence[int]) -> float:
        """Mean squared distance of the last state to the teacher's."""
        nodes, last = self.field.nodes, len(self.field.nodes) - 1
        point = Point(self.teacher.states[0], nodes[0])
        for k, mode in enumerate(modes):
            key = (tuple(places[: k + 1]), tuple(modes[: k + 1]))
            if key not in self._clean:
                self._clean[key] = self.field(point.x, places[k], mode)
                self.calls += 1
            there = places[k + 1]
            point = point.step(self._clean[key], nodes[there], 1 if there == last else self.order)
        return mean_square(point.x, self.teacher.states[-1])


def neighbours(route: Route, modes: int, phases: Sequence[int], reach: int = 2) -> Iterator[Route]:
    """Routes one change away: an inner place moved by up to `reach`, a mode changed, a step split or left out.

    phases: as in `JointSearch`; changes that break their order are left out.
    """
    for places, chosen in _changes(list(route.places), list(route.modes), modes, reach):
        levels = [phases[m] for m in chosen]
        if levels == sorted(levels):
            yield Route(tuple(places), tuple(chosen), float("nan"))


def _changes(
    places: list[int], chosen: list[int], modes: int, reach: int
) -> Iterator[tuple[list[int], list[int]]]:
    for k in range(1, len(places) - 1):
        for move in range(-reach, reach + 1):
            there = places[k] + move
            if move and places[k - 1] < there < places[k + 1]:
                yield [*places[:k], there, *places[k + 1 :]], chosen
        yield places[:k] + places[k + 1 :], chosen[:k] + chosen[k + 1 :]
    for k in range(len(chosen)):
        for mode in range(modes):
            if mode != chosen[k]:
                yield places, [*chosen[:k], mode, *chosen[k + 1 :]]
        middle = (places[k] + places[k + 1]) // 2
        if places[k] < middle:
            for mode in range(modes):
                yield [*places[: k + 1], middle, *places[k + 1 :]], [*chosen[: k + 1], mode, *chosen[k + 1 :]]


def polished(
    walker: Walker,
    route: Route,
    price: Sequence[float],
    limit: float,
    phases: Sequence[int],
    trials: int = 30,
    seed: int = 0,
) -> Route:
    """The route after trying up to `trials` changes that keep within `limit`, in random order, each improvement kept.

    Never worse than it was. Stops early where no change at all improves it.
    """
    generator = torch.Generator().manual_seed(seed)
    best = Route(route.places, route.modes, walker.error(route.places, route.modes))
    left, improved = trials, True
    while left > 0 and improved:
        improved = False
        around = [r for r in neighbours(best, len(price), phases) if sum(price[m] for m in r.modes) <= limit]
        for k in torch.randperm(len(around), generator=generator).tolist()[:left]:
            left -= 1
            error = walker.error(around[k].places, around[k].modes)
            if error < best.value:
                best, improved = Route(around[k].places, around[k].modes, error), True
                break
    return best

"""Shortest paths through a grid of times: additive costs, exactly so many edges, or exactly so much money.

Nodes 0..M in sampling order; an edge i -> j, i < j, is one solver step. Costs are tables; nothing is sampled here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pliant.errors import PlanError


class Route(NamedTuple):
    """Nodes from 0 to M, the mode of every edge, and what the path costs in errors."""

    places: tuple[int, ...]
    modes: tuple[int, ...]
    value: float


def shortest_path(cost: Tensor, edges: int, discount: float = 1.0) -> Route:
    """The cheapest path 0 -> M of exactly `edges` edges (BOSS, arXiv 2312.16414; sheet C, 6).

    cost: (M+1, M+1), cost[i, j] for i < j. discount: every edge's followers count `discount` times more than itself
    (GITS, arXiv 2405.11326: 1.15 stands for errors that grow when made late); `value` is that sum. Ties go to the
    smaller next node. O(M^2 edges). Raises PlanError if there is no such path.
    """
    m = _last(cost)
    if not 1 <= edges <= m:
        raise PlanError(f"a path through {m + 1} nodes has between 1 and {m} steps, not {edges}")
    table = cost.double().masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(), math.inf)
    value = table[:, m].clone()  # with one edge left
    choices: list[Tensor] = []
    for _ in range(edges - 1):
        options = table + discount * value[None]  # (from, through)
        options[:, m] = math.inf
        value, choice = options.min(1)  # the first of equals
        choices.append(choice)
    place, places = 0, [0]
    for choice in reversed(choices):
        place = int(choice[place])
        places.append(place)
    return Route((*places, m), (0,) * edges, float(value[0]))


def budgeted_path(cost: Tensor, price: Sequence[float], limit: float, width: int = 10**9) -> Route:
    """The path 0 -> M with the least sum of costs among those whose prices sum to `limit` at most: exact.

    A label is (money, error) at a node; of the labels of a node only those stay that no other beats in both. width: at
    most so many per node, evenly through them (exact if never reached). Raises PlanError if no path is affordable.
    """
    m = _last(cost[0])
    table = cost.double().tolist()
    cheapest = min(price)
    # (money, error, (node, label) before, mode)
    labels: list[list[tuple[float, float, tuple[int, int], int]]] = [[] for _ in range(m + 1)]
    labels[0] = [(0.0, 0.0, (-1, -1), -1)]
    for j in range(1, m + 1):
        found = []
        for i in range(j):
            for k, (money, error, _, _) in enumerate(labels[i]):
                for mode, each in enumerate(price):
                    spent = money + each
                    if spent + (cheapest if j < m else 0.0) <= limit * (1 + 1e-12):
                        found.append((spent, error + table[mode][i][j], (i, k), mode))
        found.sort(key=lambda label: label[:2])
        kept, least = [], math.inf
        for label in found:
            if label[1] < least:
                kept.append(label)
                least = label[1]
        if len(kept) > width:
            kept = [kept[round(n * (len(kept) - 1) / (width - 1))] for n in range(width)]
        labels[j] = kept
    if not labels[m]:
        raise PlanError(f"no path costs at most {limit:g}: the cheapest step alone costs {cheapest:g}")
    value = labels[m][-1][1]
    node, k = m, len(labels[m]) - 1
    places, modes = [m], []
    while node:
        _, _, (node, k), chosen = labels[node][k]
        modes.append(chosen)
        places.append(node)
    return Route(tuple(reversed(places)), tuple(reversed(modes)), value)


def _last(cost: Tensor) -> int:
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or len(cost) < 2:
        raise PlanError(f"edge costs are a square table of at least 2 nodes, got {tuple(cost.shape)}")
    return len(cost) - 1

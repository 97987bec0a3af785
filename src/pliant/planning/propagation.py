"""OptimalSteps (arXiv 2503.21774; sheet H, 8): the best grid when errors travel.

BOSS and GITS judge every step from the teacher's state. Here the student's own state is carried: after k steps each
node holds the state of the best way to reach it, and that state takes the next step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pliant.errors import PlanError
from pliant.planning.dynamic_programming import Route
from pliant.planning.field import Field
from pliant.planning.stepping import Point, mean_square
from pliant.planning.teacher import Trajectories


def optimal_steps(field: Field, teacher: Trajectories, edges: int, order: int = 1) -> Route:
    """Nodes of `edges` steps from 0 to M whose own last state is nearest to the teacher's, by the greedy recursion.

    At every node and number of steps the way with the least distance to the teacher there survives (one for all
    samples; the authors take the median over images of grids of their own). Calls: about edges * M on N samples. order:
    of the steps. All ways begin at node 0 (the released code lets the first step begin anywhere). Not exact: the
    nearest state half-way need not lead to the nearest end.
    """
    m = len(field.nodes) - 1
    if not 1 <= edges <= m:
        raise PlanError(f"a path through {m + 1} nodes has between 1 and {m} steps, not {edges}")
    points: dict[int, tuple[float, Point, tuple[int, ...]]] = {0: (0.0, Point(teacher.states[0], field.nodes[0]), (0,))}
    for k in range(edges):
        found: dict[int, tuple[float, Point, tuple[int, ...]]] = {}
        left = edges - 1 - k  # steps after this one
        for i, (_, point, way) in points.items():
            clean = field(point.x, i)
            targets = [m] if left == 0 else range(i + 1, m - left + 1)
            for j in targets:
                there = point.step(clean, field.nodes[j], 1 if left == 0 and edges < 15 else order)
                error = mean_square(there.x, teacher.states[j])
                if error < found.get(j, (math.inf,))[0]:
                    found[j] = (error, there, (*way, j))
        points = found
    error, _, way = points[m]
    return Route(way, (0,) * edges, error)


def growth(field: Field, teacher: Trajectories, seed: int = 0, size: float = 1e-2) -> Tensor:
    """(M+1,): how much a small error made at a node has grown, in mean square, when it arrives at the end.

    Measured: the teacher's grid is walked once more from starts moved by `size`, and the ratio of distances to the
    teacher at the end and at every node is taken.
    """
    generator = torch.Generator().manual_seed(seed)
    start = teacher.states[0]
    push = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start)
    point = Point(start + size * push, field.nodes[0])
    distances = [mean_square(point.x, start)]
    base = Point(start, field.nodes[0])
    for i in range(len(field.nodes) - 1):
        point = point.step(field(point.x, i), field.nodes[i + 1])
        base = base.step(teacher.clean[i] if i == 0 else field(base.x, i), field.nodes[i + 1])
        distances.append(mean_square(point.x, base.x))
    end = distances[-1]
    return torch.tensor([end / max(d, 1e-300) for d in distances], dtype=torch.float64)

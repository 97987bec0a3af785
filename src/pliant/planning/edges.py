"""One-step errors between any two times of a teacher: the table that BOSS and GITS search."""

from __future__ import annotations

import torch
from torch import Tensor

from pliant.planning.field import Field
from pliant.planning.stepping import Point, mean_square
from pliant.planning.teacher import Trajectories


def edge_costs(field: Field, teacher: Trajectories, mode: int = 0) -> Tensor:
    """(M+1, M+1): mean squared error at j of one first-order step from the teacher's state at i, infinite for j <= i.

    teacher: at the field's nodes. One call per node.
    """
    m = len(field.nodes) - 1
    table = torch.full((m + 1, m + 1), torch.inf, dtype=torch.float64)
    for i in range(m):
        point = Point(teacher.states[i], field.nodes[i])
        clean = field(teacher.states[i], i, mode)
        for j in range(i + 1, m + 1):
            table[i, j] = mean_square(point.step(clean, field.nodes[j]).x, teacher.states[j])
    return table

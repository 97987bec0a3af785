"""GITS (arXiv 2405.11326; sheet H, 8): BOSS's path with a factor on what comes later."""

from __future__ import annotations

from pliant.planning.boss import one_step_times
from pliant.planning.request import Request, planner
from pliant.planning.result import PlanResult
from pliant.planning.searching import NODES, SAMPLES


@planner
def gits(
    request: Request,
    *,
    nodes: int = NODES,
    samples: int = SAMPLES,
    discount: float = 1.15,
) -> PlanResult:
    """As `boss`; every step's followers count `discount` times more than itself (1 is BOSS)."""
    return one_step_times("gits", discount, request, nodes, samples)

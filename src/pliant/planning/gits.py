"""GITS (arXiv 2405.11326; sheet H, 8): BOSS's path with a factor on what comes later."""

from __future__ import annotations

from pliant.denoiser import Denoiser
from pliant.planning.boss import one_step_times
from pliant.planning.objective import Objective
from pliant.planning.result import PlanResult, Progress
from pliant.planning.searching import NODES, SAMPLES
from pliant.plans import Budget


def gits(
    model: Denoiser,
    budget: float | str | Budget,
    *,
    objective: Objective | None = None,
    steps: int = 50,
    guidance: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    nodes: int = NODES,
    samples: int = SAMPLES,
    discount: float = 1.15,
) -> PlanResult:
    """As `boss`; every step's followers count `discount` times more than itself (1 is BOSS)."""
    return one_step_times("gits", discount, model, budget, objective, steps, guidance, seed, progress, nodes, samples)

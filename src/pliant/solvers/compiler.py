"""From decisions (a grid and one solver per step) to a program."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pliant.errors import PlanError
from pliant.paths import Path, PredictionType
from pliant.solvers.builder import ProgramBuilder
from pliant.solvers.program import Program
from pliant.solvers.registry import SolverLike, get_solver


def compile_program(
    path: Path,
    times: Tensor | Sequence[float],
    solvers: SolverLike | Sequence[SolverLike],
    stored: PredictionType,
    variance: bool = False,
    reset_history: Collection[int] = (),
) -> Program:
    """The program that goes through `times` (steps+1, house time) with `solvers` (one per step, or one for
    all).

    stored: the prediction kind the network returns. variance: whether it also returns a variance code.
    reset_history: steps before which multistep solvers forget earlier outputs (by default the history is
    kept, also when the compute changes: outputs of a weak and a powerful network estimate the same quantity).
    Raises PlanError for a grid that is not strictly monotone in [0, 1], a wrong number of solvers, an unknown
    solver, noise on the way from data to noise, or a step that the path does not allow.
    """
    grid = check_times(times)
    steps = len(grid) - 1
    if isinstance(solvers, Sequence) and not isinstance(solvers, str):
        chosen = [get_solver(s) for s in solvers]
    else:
        chosen = [get_solver(solvers)] * steps
    if len(chosen) != steps:
        raise PlanError(
            f"{len(grid)} times make {steps} steps, but {len(chosen)} solvers were given; give one per step"
        )
    forgotten = set(reset_history)
    if wrong := sorted(k for k in forgotten if not 0 <= k < steps):
        raise PlanError(f"reset_history names steps {wrong}, but the grid has steps 0 to {steps - 1}")
    builder = ProgramBuilder(path, grid, stored, variance)
    for i, solver in enumerate(chosen):
        if builder.increasing and solver.stochastic:
            raise PlanError(
                f"step {i} uses {solver.name}, which draws noise, but the grid runs from data to noise "
                f"(inversion); use a deterministic solver such as ddim, heun or dpmpp-2m"
            )
        if i in forgotten:
            builder.history.clear()
        solver.emit(builder, i)
        builder.close_step(solver.name)
    return builder.finish()


def _place(k: int, count: int) -> str:
    return f"step {k}" if k < count - 1 else "the end"


def check_times(times: Tensor | Sequence[float]) -> list[float]:
    """`times` as floats: at least two, in [0, 1], strictly decreasing (sampling) or strictly increasing
    (inversion).
    """
    t = torch.as_tensor(times, dtype=torch.float64)
    if t.ndim != 1 or len(t) < 2:
        raise PlanError(f"a time grid is a list of at least 2 times, got shape {tuple(t.shape)}")
    grid: list[float] = t.tolist()
    if outside := [(k, v) for k, v in enumerate(grid) if not 0.0 <= v <= 1.0]:
        k, wrong = outside[0]
        raise PlanError(f"times lie between 0 (data) and 1 (noise), got {wrong} for {_place(k, len(grid))}")
    decreasing = grid[-1] < grid[0]
    for k, (a, b) in enumerate(pairwise(grid)):
        if a == b:
            raise PlanError(f"times {k} and {k + 1} are both {a:g}; every step must move")
        if (b < a) != decreasing:
            raise PlanError(f"times must run in one direction, but time {k + 1} ({b:g}) turns back after {a:g}")
    return grid

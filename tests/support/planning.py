"""Planning problems with exact clean-data estimates: mixtures of Gaussians on a grid of times."""

from typing import Any

import torch

from analytic import GMM2D, Mixture
from pliant.denoiser import Denoiser
from pliant.paths import Path, get_path
from pliant.planning import Score
from pliant.planning.field import FunctionField
from pliant.planning.stepping import mean_square, trajectories_of, walk
from pliant.planning.teacher import Trajectories
from pliant.plans import Plan
from pliant.solvers import compile_program, run

TWO_BUMPS = Mixture(
    torch.tensor([0.5, 0.5], dtype=torch.float64),
    torch.tensor([[-1.0], [1.0]], dtype=torch.float64),
    torch.tensor([0.2, 0.2], dtype=torch.float64),
)


def field_of(*mixtures: Mixture, nodes: int = 100, path: str | Path = "linear") -> FunctionField:
    """One mode per mixture, on a uniform grid of `nodes` intervals."""
    times = torch.linspace(1, 0, nodes + 1, dtype=torch.float64).tolist()
    modes = [lambda x, node, m=m: m.pair(x, node.alpha, node.sigma)[0] for m in mixtures]
    return FunctionField(get_path(path) if isinstance(path, str) else path, times, *modes)


def starts(count: int, dim: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64)


def problem(nodes: int = 100, count: int = 2000, seed: int = 0) -> tuple[FunctionField, Trajectories]:
    """The two bumps of sheet H, 8, and their Euler teacher on every node."""
    field = field_of(TWO_BUMPS, nodes=nodes)
    return field, trajectories_of(field, starts(count, seed=seed))


def end_error(field: FunctionField, teacher: Trajectories, places: list[int], order: int = 1) -> float:
    """Root mean square distance of the final states to the teacher's."""
    return mean_square(walk(field, teacher.states[0], places, order=order), teacher.states[-1]) ** 0.5


def evenly(steps: int, nodes: int = 100) -> list[int]:
    return [round(nodes * k / steps) for k in range(steps + 1)]


class FlowError:
    """An objective: how far a plan's solver ends from the exact flow of gmm2d, in mean square; no network is called.

    model: what its plans are checked and priced for; its path is the mixture's.
    """

    name = "error to the exact flow of gmm2d"

    def __init__(self, model: Denoiser, count: int = 64, seed: int = 0) -> None:
        self.start = starts(count, 2, seed)
        self.exact = self.end(Plan.uniform(model, 300, "rk4"))
        self.measured: list[Plan] = []

    def describe(self) -> dict[str, Any]:
        return {"objective": self.name}

    def end(self, plan: Plan) -> torch.Tensor:
        program = compile_program(plan.path, plan.times, [step.solver for step in plan.steps], "velocity", False, [])
        *_, last = run(program, self.start, GMM2D.evaluate(program))
        return last.x

    def __call__(self, plan: Plan) -> Score:
        self.measured.append(plan)
        value = mean_square(self.end(plan), self.exact)
        return Score(value, value, value, len(self.start))


__all__ = ["GMM2D", "TWO_BUMPS", "FlowError", "end_error", "evenly", "field_of", "problem", "starts"]

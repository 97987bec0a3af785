"""What time planners call: clean-data estimates at the nodes of a grid, in one of several modes of compute.

`ModelField` asks a denoiser through the sampling engine (guidance included); `FunctionField` a plain function, so that
every planner can be tested against problems with exact answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.guidance import Guidance
from pliant.paths import Path
from pliant.plans import Plan
from pliant.plans.calls import calls_in
from pliant.plans.engine import Lowered, Weights
from pliant.plans.evaluator import Evaluator
from pliant.plans.plan import Step, made_for
from pliant.plans.sampling import check_labels
from pliant.solvers import Node, get_solver, nodes_of
from pliant.solvers.interpreter import sample_coefficients


@dataclass(frozen=True)
class Mode:
    """What one step may use of the network."""

    compute: Compute
    guidance: Guidance | None = None

    def describe(self) -> str:
        guided = "" if self.guidance is None else f" | {self.guidance.describe()}"
        return f"{self.compute.describe()}{guided}"


class Field(Protocol):
    """Clean-data estimates of N samples at the nodes of a falling grid."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """M+1 nodes, noisy to clean; nothing is called at the last."""
        ...

    def __call__(self, x: Tensor, place: int, mode: int = 0) -> Tensor:
        """States (N, ...) at node `place` -> clean-data estimates of the same shape."""
        ...


class FunctionField:
    """A field made of a function per mode, (states (N, ...), node) -> clean-data estimates."""

    def __init__(self, path: Path, times: Sequence[float], *clean: Callable[[Tensor, Node], Tensor]) -> None:
        self.nodes = tuple(nodes_of(path, times))
        self.clean = clean

    def __call__(self, x: Tensor, place: int, mode: int = 0) -> Tensor:
        return self.clean[mode](x, self.nodes[place])


class ModelField:
    """A denoiser as a field: one sampling engine per mode, ready at every node for these labels."""

    def __init__(self, model: Denoiser, times: Sequence[float], labels: Sequence[int], modes: Sequence[Mode]) -> None:
        """Raises PlanError for a mode that the model cannot run, or that remembers earlier calls."""
        checked = check_labels(labels, model)
        self.nodes = tuple(nodes_of(model.path, times))
        weights, self._runs = Weights(), []
        ddim = get_solver("ddim")
        for mode in modes:
            if not mode.compute.plain or (mode.guidance is not None and mode.guidance.against not in _MEMORYLESS):
                raise PlanError(f"the mode {mode.describe()!r} depends on earlier calls; planners of times need others")
            rows = tuple(Step(n.t, ddim, mode.compute, mode.guidance) for n in self.nodes[:-1])
            plan = Plan(rows, model.path, self.nodes[-1].t, made_for(model))
            plan.check(model)
            program = plan.program(model)
            lowered = {}
            for call in calls_in(plan):
                own = weights.guide if call.streams == ("guide",) else weights.own
                lowered[call] = Lowered(call.model(model), call.compute, own)
            self._runs.append((Evaluator(model, plan, program, lowered, checked), program))

    def __call__(self, x: Tensor, place: int, mode: int = 0) -> Tensor:
        _, program = self._runs[mode]
        p, q = sample_coefficients(program.stored, self.nodes[place])
        return torch.add(p * x, self.output(x, place, mode), alpha=q)

    @torch.no_grad()
    def output(self, x: Tensor, place: int, mode: int = 0) -> Tensor:
        """The guided prediction (N, ...) in the model's own kind, in x's dtype."""
        evaluate, program = self._runs[mode]
        return evaluate(x, program.evaluations[place]).value.to(x.dtype)


_MEMORYLESS = ("null", "weak", "guide")

"""The converged trajectories that cheap objectives compare with: many steps at full compute, kept at every step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.evaluation import assigned_labels
from pliant.files import tensors_sha256
from pliant.plans import Plan, Sampler
from pliant.solvers import Node, nodes_of


@dataclass(frozen=True, eq=False)
class Trajectories:
    """States of N samples at falling times, and the clean-data estimate at each but the last.

    nodes: M+1; states: (M+1, N, ...); clean: (M, N, ...).
    """

    nodes: tuple[Node, ...]
    states: Tensor
    clean: Tensor

    def at(self, node: Node) -> Tensor:
        """States (N, ...) at any node of the path between the first and the last.

        From the stored time before it, one exact step for clean data that changes linearly in time: the error is of the
        third order in the teacher's step.
        """
        t = node.t
        if not self.nodes[-1].t <= t <= self.nodes[0].t:
            raise PlanError(f"time {t:g} lies outside the teacher's, {self.nodes[0].t:g} to {self.nodes[-1].t:g}")
        k = max(i for i, n in enumerate(self.nodes) if n.t >= t)
        here = self.nodes[k]
        if here.t == t:
            return self.states[k]
        clean = self.clean[k]
        if k + 1 < len(self.clean):
            share = 0.5 * (here.t - t) / (here.t - self.nodes[k + 1].t)
            clean = clean + share * (self.clean[k + 1] - clean)
        return ddim(self.states[k], clean, here, node)


def ddim(x: Tensor, clean: Tensor, s: Node, t: Node) -> Tensor:
    """The first-order step from node s to t, exact for a constant clean-data estimate."""
    keep = t.sigma / s.sigma
    return keep * x + (t.alpha - s.alpha * keep) * clean


@dataclass(frozen=True)
class TeacherSettings:
    """A teacher in numbers, for recipes."""

    steps: int = 100
    solver: str = "dpmpp-2m"
    guidance: float | None = None

    def plan(self, model: Denoiser) -> Plan:
        """The teacher's plan: the model's own patch size at every step."""
        return Plan.uniform(model, self.steps, self.solver, guidance=self.guidance)

    def to_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "solver": self.solver, "guidance": self.guidance}


def weights_of(model: Denoiser) -> str:
    """SHA-256 of all weights, a guide's too: a fingerprint is the same for every training of one architecture."""
    own = tensors_sha256(model.network.state_dict())
    return own if model.guide is None else hashlib.sha256((own + weights_of(model.guide)).encode()).hexdigest()


def labels_of(model: Denoiser, seeds: Sequence[int]) -> Tensor:
    """The class that evaluation gives to each seed, (N,) int64: balanced."""
    return assigned_labels(seeds, model.num_classes)


@torch.no_grad()
def teacher_trajectories(model: Denoiser, plan: Plan, seeds: Sequence[int]) -> Trajectories:
    """Run a plan with one evaluation per step and keep everything; seed s has class `labels_of`."""
    program = plan.program(model)
    if [e.step for e in program.evaluations] != list(range(len(plan.steps))):
        raise PlanError("a teacher that is kept step by step needs a solver with one evaluation per step")
    sampler = Sampler(model, plan)
    request = sampler.begin(labels_of(model, seeds), seeds)
    states, clean = [request.x], []
    for result in sampler.steps(labels_of(model, seeds), seeds, request.x):
        states.append(result.x)
        clean.append(result.x0)
    return Trajectories(tuple(nodes_of(plan.path, plan.times)), torch.stack(states), torch.stack(clean))

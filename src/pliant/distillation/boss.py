"""BOSS (arXiv 2312.16414): the best few Euler times of the teacher, then a short training that straightens just those.

The schedule is the shortest path through one-step errors along the teacher's own fine trajectories. That cost does not
see errors travel, so the schedule is kept only if its end-to-end error beats the uniform one's.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pliant.denoiser import Denoiser
from pliant.distillation.recipe import Recipe, TrainPart
from pliant.distillation.workshop import Workshop
from pliant.errors import FormatError
from pliant.files import write_json
from pliant.formats import load
from pliant.planning.dynamic_programming import shortest_path
from pliant.plans import Plan, sample, sample_steps, uniform
from pliant.training.flow_config import MetricConfig, PlanConfig

SCHEDULE = "schedule.json"


class Boss(Recipe):
    """Schedule, trajectories, straightening; one model per number of steps (`plan.steps`)."""

    plan: PlanConfig = PlanConfig(steps=4)
    """Its times are found; the solver is Euler's."""
    anchors: int = Field(default=32, ge=2)
    """Steps of the teacher's fine Euler trajectories, between which the schedule chooses; the paper takes 100."""
    search: int = Field(default=100, ge=1)
    """Trajectories the schedule is found on."""
    count: int = Field(default=2048, ge=1)
    """Trajectories to train on."""
    first_seed: int = Field(default=10_000_000, ge=0)
    guidance: float = Field(default=1.0, ge=0)
    train: TrainPart = TrainPart(trainable="lora")
    metric: MetricConfig = MetricConfig()

    def run(self, work: Workshop) -> str:
        places = self._schedule(work)
        fine = PlanConfig(steps=self.anchors, guidance=self.guidance)
        store = work.trajectories("trajectories", work.teacher, fine, places, self.count, self.first_seed)
        times = [1.0 - k / self.anchors for k in places]
        objective = {"name": "segments", "times": times, "metric": self.metric.model_dump()}
        return work.train("straightened", work.teacher, work.flexible(objective), self.train, store)

    def final_plan(self, work: Workshop) -> PlanConfig:
        places = self._schedule(work)
        return self.plan.model_copy(update={"times": [1.0 - k / self.anchors for k in places], "solver": "euler"})

    def _schedule(self, work: Workshop) -> list[int]:
        """Places of the schedule among the anchors, found once."""
        file = work.folder / SCHEDULE
        if not file.is_file():
            teacher = load(work.teacher)
            with work.progress("schedule") as advance:
                found = best_schedule(teacher, self.anchors, self.plan.steps, self.search, self.guidance)
                advance(1, 1)
            work.say(f"schedule {list(found.places)} of {self.anchors} anchors ({found.chosen})")
            if work.is_main:
                write_json(file, found._asdict())
            return list(found.places)
        try:
            return [int(k) for k in json.loads(file.read_text(encoding="utf-8"))["places"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{file} is damaged ({error}); delete it to find the schedule again") from None


class Schedule(NamedTuple):
    """Places 0 = noise .. anchors = data."""

    places: list[int]
    chosen: str
    """"shortest path" or "uniform", whichever ended nearer to the fine trajectories."""
    value: float
    """Of the shortest path: its sum of one-step errors."""
    errors: dict[str, float]
    """End-to-end mean squared error of both."""


def euler_costs(states: Tensor) -> Tensor:
    """(M+1, M+1) float64: mean over samples of |x_k - x_j - v_j (t_k - t_j)|^2, infinite for k <= j.

    states: (M+1, N, ...) of an Euler trajectory on equal steps, whose velocities are its own differences.
    """
    flat = states.flatten(2).double()
    m = len(flat) - 1
    table = torch.full((m + 1, m + 1), torch.inf, dtype=torch.float64)
    for j in range(m):
        jump = flat[j + 1] - flat[j]
        for k in range(j + 1, m + 1):
            table[j, k] = (flat[k] - flat[j] - (k - j) * jump).square().sum(1).mean()
    return table


def best_schedule(teacher: Denoiser, anchors: int, steps: int, samples: int, guidance: float = 1.0) -> Schedule:
    """Euler times for `steps` steps of a teacher."""
    fine = uniform(teacher, anchors, "euler", None, guidance, _times(range(anchors + 1), anchors))
    labels = [k % teacher.num_classes for k in range(samples)]
    seeds = list(range(5_000_000, 5_000_000 + samples))
    states = trajectory_states(teacher, fine, labels, seeds)
    route = shortest_path(euler_costs(states), steps)
    even = [round(k * anchors / steps) for k in range(steps + 1)]
    candidates = {"shortest path": list(route.places), "uniform": even}
    errors = {}
    for name, places in candidates.items():
        plan = uniform(teacher, steps, "euler", None, guidance, _times(places, anchors))
        end = sample(teacher, plan, labels, seeds)
        errors[name] = float((end - states[-1]).flatten(1).square().sum(1).mean())
    chosen = min(errors, key=lambda name: errors[name])
    return Schedule(candidates[chosen], chosen, route.value, errors)


def _times(places: object, anchors: int) -> list[float]:
    return [1.0 - k / anchors for k in places]  # type: ignore[attr-defined]


def trajectory_states(model: Denoiser, plan: Plan, labels: list[int], seeds: list[int]) -> Tensor:
    """(steps+1, N, C, H, W): the start and the state after every step."""
    from pliant.plans.noise import start_state

    start = start_state(plan.program(model).start, seeds, model.sample_shape, model.device, model.path)
    return torch.stack([start, *(r.x.clone() for r in sample_steps(model, plan, labels, seeds))])

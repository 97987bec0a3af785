"""Seconds of the steps of real sampling runs: every piece of a throughput table is timed where it will be spent.

Between network calls the processor's caches are full of the network, the first call of a run finds them full of
something else, and one network's call after another's finds neither: no call repeated alone takes what it takes there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from pliant.compute import Compute
from pliant.denoiser import Denoiser
from pliant.guidance import Guidance
from pliant.plans.engine import Weights
from pliant.plans.plan import Plan, Step
from pliant.plans.sampling import Sampler

Clock: TypeAlias = Callable[[], float]

PASSES = 3
"""Over everything that is timed, so that a slow stretch of seconds hits a third of each number's runs."""
STEPS = 8
"""Of a timed run."""
FEW, SLOW = 4, 0.02
"""Steps of a run whose steps take more than so many seconds; nothing is lost in them that happens once per run."""
SETTLED = 3
"""Steps after which a run has warmed up."""


class Stopwatch:
    """Seconds on a clock, once a device has done what it was asked."""

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter) -> None:
        self.device, self.clock = device, clock

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def __call__(self, run: Callable[[], object]) -> float:
        """Median seconds of something short, done over and over, after a first time that is not counted."""
        run()
        first = self._once(run, 1)
        inner = max(1, round(0.003 / max(first, 1e-7)))
        return statistics.median([first, *(self._once(run, inner) for _ in range(8))])

    def _once(self, run: Callable[[], object], inner: int) -> float:
        start = self.now()
        for _ in range(inner):
            run()
        return (self.now() - start) / inner

    def steps(self, sampler: Sampler, batch: int) -> list[float]:
        """Seconds of every step of one run; the first with all that comes before it."""
        model = sampler.model
        labels, seeds = [i % model.num_classes for i in range(batch)], list(range(batch))
        offset = sampler.program.needs_offset or sampler.program.start.beta != 0.0
        mu = torch.zeros(batch, *model.sample_shape) if offset else None
        found, before = [], self.now()
        for _ in sampler.steps(labels, seeds, mu=mu):
            now = self.now()
            found.append(now - before)
            before = now
        return found


def cycled(
    model: Denoiser,
    cycle: Sequence[Compute],
    steps: int,
    weights: Weights,
    guidance: Guidance | None = None,
) -> Sampler:
    """A sampler of first-order steps with these computes in turn. Raises PliantError where the model cannot do that."""
    plan = Plan.uniform(model, steps, "ddim")
    made = plan.with_steps(
        Step(s.t, s.solver, cycle[i % len(cycle)], guidance) for i, s in enumerate(plan.steps)
    )
    return Sampler(model, made, weights=weights)


class Turns:
    """Samplers that take turns, so that a slow moment of the machine hits all of them, and each finds the caches full
    of another one's. Their first runs, in which kernels are chosen and memory is found, are not counted."""

    def __init__(self, samplers: Mapping[str, Sampler], batch: int, watch: Stopwatch) -> None:
        """Raises PliantError for a sampler that cannot run."""
        self.samplers, self.batch, self.watch = samplers, batch, watch
        self.runs: list[dict[str, list[float]]] = []
        slowest = max(self.watch.steps(sampler, batch)[-1] for sampler in samplers.values())
        self.rounds = 1 if slowest > SLOW else 3

    def go(self) -> None:
        """A pass: one round of a slow network, three of a fast one."""
        for _ in range(self.rounds):
            self.runs.append({name: self.watch.steps(s, self.batch) for name, s in self.samplers.items()})

    def medians(self) -> dict[str, list[float]]:
        """Seconds of every step of each sampler, over all passes."""
        return {
            name: [statistics.median(step) for step in zip(*(run[name] for run in self.runs), strict=True)]
            for name in self.samplers
        }

    def spread(self) -> float:
        """Between the slowest and the fastest pass of the first sampler, as a share of its median."""
        name = next(iter(self.samplers))
        each = [statistics.median(run[name][1:] or run[name]) for run in self.runs]
        passes = [statistics.median(each[k : k + self.rounds]) for k in range(0, len(each), self.rounds)]
        middle = statistics.median(passes)
        return (max(passes) - min(passes)) / middle if middle > 0.0 else 0.0


def steady(steps: Sequence[float], cycle: int = 1) -> float:
    """Seconds of the last step of a cycle in a run that has warmed up, as far as the run has such steps."""
    last = range(cycle - 1, len(steps), cycle)
    settled = [i for i in last if i >= SETTLED and i >= cycle] or [last[-1]]
    return statistics.median(steps[i] for i in settled)

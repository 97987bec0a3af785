"""Plans measured for a frontier: quality kept in files by what decides it, seconds in turns.

Quality is a Fréchet distance on seeds that no planner has seen, not even to confirm what it found
(`distribution.MEASURED`), the same for every plan.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pliant.denoiser import Denoiser
from pliant.errors import DataError
from pliant.evaluation import FeatureStatistics, Interval, bootstrap_interval, frechet_distance, student_interval
from pliant.evaluation.bootstrap import normal_interval
from pliant.files import write_json
from pliant.planning.distribution import FrechetObjective
from pliant.planning.objective import LEVEL
from pliant.plans import Plan, Sampler
from pliant.plans.engine import Weights

METHOD = 2
"""Raised when the same facts give another number or error than before."""
BOOTSTRAP_DIM = 256
"""Largest feature for which two hundred resampled distances take seconds."""


@dataclass(frozen=True)
class Repeat:
    """The distance of one set of seeds, and its standard error by bootstrap (None: features too long)."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Quality:
    """The distance of a plan: every repeat has seeds of its own and the same number of images."""

    repeats: tuple[Repeat, ...]

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(r.value for r in self.repeats)

    @property
    def value(self) -> float:
        return sum(self.values) / len(self.values)

    def interval(self, level: float = LEVEL) -> Interval | None:
        """Of the mean, by which samples were drawn: the repeats' bootstrap errors together, else Student's interval
        over the repeats; None for a single repeat without an error."""
        errors = [r.error for r in self.repeats if r.error is not None]
        if len(errors) == len(self.repeats):
            # The error of a mean of independent values; steadier than what the repeats' few differences say.
            return normal_interval(self.value, sum(e * e for e in errors) ** 0.5 / len(errors), level)
        return student_interval(self.values, level) if len(self.values) > 1 else None


class QualityStore:
    """Distances in a folder, one small file per plan and set of seeds. Interrupted runs go on where they stopped.

    The name of a file holds the plan's hash and that of `facts`: all else that decides the number.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts

    def file(self, plan: Plan, objective: FrechetObjective) -> Path:
        said = json.dumps({"method": METHOD, **self.facts, **objective.describe()}, sort_keys=True, default=str)
        return self.folder / f"{plan.digest()}-{hashlib.sha256(said.encode()).hexdigest()[:16]}.json"

    def known(self, plan: Plan, objective: FrechetObjective) -> Repeat | None:
        """Raises DataError for a damaged file."""
        file = self.file(plan, objective)
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            error = data["error"]
            return Repeat(float(data["value"]), None if error is None else float(error))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} is damaged ({error}); delete it to measure again") from None

    def measure(self, plan: Plan, objective: FrechetObjective) -> Repeat:
        """The stored distance, or a new one, which is stored."""
        found = self.known(plan, objective)
        if found is None:
            found = distance(plan, objective)
            facts = {**self.facts, **objective.describe(), "plan": plan.digest()}
            write_json(self.file(plan, objective), {**asdict(found), "facts": facts})
        return found


def distance(plan: Plan, objective: FrechetObjective) -> Repeat:
    """Sample a plan and measure it. Features are not kept."""
    features, reference = objective.features(plan), objective.reference.statistics
    if features.shape[1] > BOOTSTRAP_DIM:
        return Repeat(frechet_distance(FeatureStatistics.of(features, reference.provenance), reference), None)
    groups = objective.labels if len(features) > 2 * objective.model.num_classes else None
    found = bootstrap_interval(features, reference, LEVEL, groups=groups)
    return Repeat(found.value, found.standard_error)


def seconds_in_turns(
    model: Denoiser,
    plans: Sequence[Plan],
    batch: int,
    rounds: int = 5,
    advance: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds per image of each plan by its digest: the median over rounds in which the plans take turns, so that a
    slow moment of the machine hits all of them; after a warm-up of one round. clock: what is read before and after."""
    weights = Weights()
    samplers = {plan.digest(): Sampler(model, plan, weights=weights) for plan in plans}
    labels, seeds = [k % model.num_classes for k in range(batch)], list(range(batch))
    times: dict[str, list[float]] = {key: [] for key in samplers}
    done = 0
    for number in range(rounds + 1):
        for key, sampler in samplers.items():
            begun = clock()
            sampler(labels, seeds).cpu()  # waits for the device
            if number:
                times[key].append((clock() - begun) / batch)
            done += 1
            if advance is not None:
                advance(done, (rounds + 1) * len(samplers))
    return {key: statistics.median(values) for key, values in times.items()}

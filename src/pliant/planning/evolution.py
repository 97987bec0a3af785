"""Evolutionary search: one engine for every space. Time-boxed, resumable, deterministic by seed.

Each generation proposes a batch from the best so far (crossover, mutation, some fresh draws), repairs what breaks a
constraint or drops it, and measures what is new. A predictor may screen: many are proposed, the promising are measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol, TypeAlias

from pliant.errors import PlanError, PliantError
from pliant.planning.journal import Journal, key_of
from pliant.planning.objective import Score
from pliant.planning.result import Progress


class Space(Protocol):
    """What is searched. Candidates are JSON-ready."""

    def sample(self, rng: Random) -> Any: ...

    def mutate(self, value: Any, rng: Random) -> Any: ...

    def cross(self, a: Any, b: Any, rng: Random) -> Any: ...

    def repair(self, value: Any, rng: Random) -> Any | None:
        """The candidate itself, a neighbour that keeps the constraints, or None to drop it."""
        ...


@dataclass(frozen=True)
class Rules:
    """How a generation is bred."""

    population: int = 16
    """Candidates per generation."""
    parents: int = 8
    """How many of the best breed."""
    crossover: float = 0.3
    """Probability of two parents instead of one; their child is mutated every other time."""
    fresh: float = 0.1
    """Probability of a new draw from the space."""
    attempts: int = 10
    """Tries to find a candidate that is new and allowed, per place."""
    oversample: int = 4
    """With a predictor: so many times the population is proposed."""
    explore: float = 0.25
    """With a predictor: this share of a generation is taken unscreened."""


@dataclass(frozen=True)
class Evaluated:
    """A candidate and its score; None if it could not be run."""

    candidate: Any
    score: Score | None

    @property
    def value(self) -> float:
        bad = self.score is None or not math.isfinite(self.score.value)
        return math.inf if bad or self.score is None else self.score.value


Predict: TypeAlias = Callable[[Any], float]
Screen: TypeAlias = Callable[[Sequence[Evaluated], Random], Predict | None]
"""(what was measured, randomness) -> a guess of any candidate's rank, lower is better; None: not enough known yet."""


@dataclass(frozen=True)
class Evolved:
    """The outcome. history: in order of measurement, best not first."""

    history: tuple[Evaluated, ...]
    seconds: float
    """Of proposing and measuring, interrupted runs of the same journal included."""
    stopped: str
    """"evaluations", "time", or "exhausted": nothing new could be proposed."""

    @property
    def ranked(self) -> list[Evaluated]:
        """Best first; of equals the earlier."""
        return sorted((e for e in self.history if e.value < math.inf), key=lambda e: e.value)

    @property
    def best(self) -> Evaluated:
        if not self.ranked:
            raise PlanError("no candidate of the search could be run; widen the space or the budget")
        return self.ranked[0]


def evolve(
    space: Space,
    measure: Callable[[Any], Score],
    evaluations: int,
    *,
    seconds: float | None = None,
    seed: int = 0,
    initial: Iterable[Any] = (),
    rules: Rules = Rules(),
    journal: Journal | None = None,
    screen: Screen | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Evolved:
    """Minimise `measure` over `space` with at most so many evaluations and about so many seconds.

    initial: candidates that are measured first. A candidate whose measurement raises a PliantError counts as infinitely
    bad. The result depends on the seed and the number of evaluations only; the clock only says when to stop.
    """
    if evaluations < 1:
        raise PlanError(f"a search needs at least one evaluation, got {evaluations}")
    if seconds is not None and not seconds > 0.0:
        raise PlanError(f"a search needs some time, got {seconds:g} seconds")
    journal = journal or Journal()
    history: list[Evaluated] = []
    seen: set[str] = set()
    spent, generation, stopped = 0.0, 0, ""
    mark = clock()
    batch = _opening(space, initial, rules, Random(f"{seed}/opening"), seen)
    while not stopped:
        for candidate in batch:
            if len(history) >= evaluations:
                stopped = "evaluations"
                break
            entry = journal.get(candidate)
            if entry is None:
                if seconds is not None and history and spent >= seconds:
                    stopped = "time"
                    break
                score = _measured(measure, candidate)
                now = clock()  # with what was needed to propose it
                entry = journal.add(candidate, score, now - mark)
                mark = now
            else:
                mark = clock()
            spent += entry.seconds
            history.append(Evaluated(candidate, entry.score))
            if progress is not None:
                progress(len(history), _expected(len(history), evaluations, spent, seconds), _incumbent(history))
        if len(history) >= evaluations:
            stopped = "evaluations"
        if stopped:
            break
        generation += 1
        batch = _bred(space, history, rules, Random(f"{seed}/{generation}"), seen, screen)
        if not batch:
            stopped = "exhausted"
    return Evolved(tuple(history), spent, stopped)


def _expected(done: int, evaluations: int, spent: float, seconds: float | None) -> int:
    """How many will be measured at the pace so far: what the clock allows, at most `evaluations`."""
    if seconds is None or spent <= 0.0:
        return evaluations
    return max(done, min(evaluations, round(done * seconds / spent)))


def _measured(measure: Callable[[Any], Score], candidate: Any) -> Score | None:
    try:
        return measure(candidate)
    except PliantError:
        return None


def _incumbent(history: Sequence[Evaluated]) -> str:
    best = min(history, key=lambda e: e.value)
    return "" if best.score is None else str(best.score)


def _new(space: Space, candidate: Any, rng: Random, seen: set[str]) -> Any | None:
    """The candidate as it may be measured, noted as seen; None if it may not or was seen."""
    repaired = space.repair(candidate, rng)
    if repaired is None or key_of(repaired) in seen:
        return None
    seen.add(key_of(repaired))
    return repaired


def _opening(space: Space, initial: Iterable[Any], rules: Rules, rng: Random, seen: set[str]) -> list[Any]:
    batch = [c for c in (_new(space, value, rng, seen) for value in initial) if c is not None]
    for _ in range(rules.attempts * rules.population):
        if len(batch) >= rules.population:
            break
        found = _new(space, space.sample(rng), rng, seen)
        if found is not None:
            batch.append(found)
    if not batch:
        raise PlanError("no candidate of the search keeps its constraints; raise the budget or widen the space")
    return batch


def _bred(
    space: Space, history: Sequence[Evaluated], rules: Rules, rng: Random, seen: set[str], screen: Screen | None
) -> list[Any]:
    """The next generation."""
    parents = [e.candidate for e in sorted(history, key=lambda e: e.value)[: rules.parents]]
    predict = None if screen is None else screen(history, rng)
    count = rules.population if predict is None else rules.population * rules.oversample
    drawn: set[str] = set(seen)
    proposed = []
    for _ in range(count):
        for _ in range(rules.attempts):
            found = _new(space, _child(space, parents, rules, rng), rng, drawn)
            if found is not None:
                proposed.append(found)
                break
    if predict is not None:
        free = proposed[: round(rules.population * rules.explore)]
        rest = sorted(proposed[len(free) :], key=predict)
        proposed = [*free, *rest[: rules.population - len(free)]]
    seen.update(key_of(c) for c in proposed)
    return proposed


def _child(space: Space, parents: Sequence[Any], rules: Rules, rng: Random) -> Any:
    chance = rng.random()
    if chance < rules.fresh:
        return space.sample(rng)
    # Better parents breed more often: the smaller of two uniform draws.
    pick = lambda: parents[min(rng.randrange(len(parents)), rng.randrange(len(parents)))]  # noqa: E731
    if chance < rules.fresh + rules.crossover and len(parents) > 1:
        child = space.cross(pick(), pick(), rng)
        return space.mutate(child, rng) if rng.random() < 0.5 else child
    return space.mutate(pick(), rng)


@dataclass(frozen=True)
class Genes:
    """A gene as a space without constraints, or with a repair."""

    gene: Any
    mend: Callable[[Any, Random], Any | None] | None = None

    def sample(self, rng: Random) -> Any:
        return self.gene.sample(rng)

    def mutate(self, value: Any, rng: Random) -> Any:
        return self.gene.mutate(value, rng)

    def cross(self, a: Any, b: Any, rng: Random) -> Any:
        return self.gene.cross(a, b, rng)

    def repair(self, value: Any, rng: Random) -> Any | None:
        return value if self.mend is None else self.mend(value, rng)

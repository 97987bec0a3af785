"""What every planner returns: a plan, what it costs, how good it is and by which measure, and what else was tried."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pliant.denoiser import Denoiser
from pliant.errors import PlanError
from pliant.files import write_json
from pliant.planning.objective import Objective, Score
from pliant.plans import AnyPlan, Plan, PlanCost, RoutedPlans, read_plan

P = TypeVar("P", Plan, RoutedPlans, AnyPlan)
FORMAT, VERSION = "pliant-plan-result", 1

Progress = Callable[[int, int, str], None]
"""(done, total, incumbent): called as a planner works; the text says what is best so far."""


@dataclass(frozen=True)
class Candidate:
    """A plan that was tried. score: None where the planner needed no measurement."""

    plan: AnyPlan
    cost: PlanCost
    score: Score | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan.to_dict(),
            "cost": asdict(self.cost),
            "score": None if self.score is None else self.score.to_dict(),
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Candidate:
        cost = {**data["cost"], "step_flops": tuple(data["cost"]["step_flops"])}
        score = data.get("score")
        worth = None if score is None else Score.from_dict(score)
        return Candidate(read_plan(data["plan"]), PlanCost(**cost), worth)


def frontier(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """The measured candidates that no other beats in FLOPs and score at once, cheapest first; equal ones count once."""
    measured = [(c.cost.flops, c.score.value, c) for c in candidates if c.score is not None]
    kept: list[Candidate] = []
    best = float("inf")
    for _, value, candidate in sorted(measured, key=lambda row: row[:2]):
        if value < best:
            kept.append(candidate)
            best = value
    return tuple(kept)


@dataclass(frozen=True)
class PlanResult:
    """The outcome of a planner. `plan.provenance["planner"]` says the same in short, in the plan's own file."""

    plan: AnyPlan
    """Several, one per class, from planners that route."""
    cost: PlanCost
    quality: Score | None
    """Of `plan`, by `objective`; None for closed forms that measured nothing."""
    objective: str
    """Name of the measure, "none" for closed forms."""
    planner: str
    settings: dict[str, Any] = field(default_factory=dict)
    """JSON-ready: budget, seeds, the objective's description, and everything else needed to repeat the search."""
    evaluations: int = 0
    """Plans measured, or what the planner says it counted."""
    seconds: float = 0.0
    frontier: tuple[Candidate, ...] = ()

    @property
    def single(self) -> Plan:
        """The plan. Raises PlanError where there are several, one per class."""
        if not isinstance(self.plan, Plan):
            raise PlanError(
                f"planner {self.planner!r} found {len(self.plan.plans)} plans, one per class, where a single one is "
                f"needed; `planning.search` and 'pliant plan --search' give them all"
            )
        return self.plan

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "planner": self.planner,
            "objective": self.objective,
            **Candidate(self.plan, self.cost, self.quality).to_dict(),
            "settings": self.settings,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "frontier": [c.to_dict() for c in self.frontier],
        }

    @staticmethod
    def from_dict(data: Any) -> PlanResult:
        """Inverse of `to_dict`. Raises PlanError for anything else."""
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise PlanError(f'this is not a planning result: expected an object with "format": "{FORMAT}", version 1')
        try:
            chosen = Candidate.from_dict(data)
            return PlanResult(
                chosen.plan,
                chosen.cost,
                chosen.score,
                str(data["objective"]),
                str(data["planner"]),
                dict(data["settings"]),
                int(data["evaluations"]),
                float(data["seconds"]),
                tuple(Candidate.from_dict(c) for c in data["frontier"]),
            )
        except (KeyError, TypeError) as error:
            raise PlanError(f"this planning result is damaged: {error}; run the planner again") from None

    def save(self, file: str | FilePath) -> None:
        """Write the result as JSON, atomically."""
        write_json(file, self.to_dict())

    @staticmethod
    def load(file: str | FilePath) -> PlanResult:
        """Raises PlanError for a missing, unreadable or foreign file."""
        try:
            return PlanResult.from_dict(json.loads(FilePath(file).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"planning result {file} is not readable JSON ({error})") from None

    def headline(self) -> str:
        """How it was found and what it is worth."""
        worth = "not measured" if self.quality is None else f"{self.objective}: {self.quality}"
        return f"{self.planner}: {worth} ({self.evaluations} evaluations in {self.seconds:.1f} s)"

    def describe(self, model: Denoiser) -> str:
        """The headline and the plan's table of steps."""
        return f"{self.headline()}\n{self.plan.describe(model)}"


def planned(plan: P, planner: str, objective: str, score: Score | None) -> P:
    """The plan with how it was found in its provenance."""
    found: dict[str, Any] = {"planner": planner, "objective": objective}
    if score is not None:
        found["score"] = [score.value, score.low, score.high]
    return replace(plan, provenance={**plan.provenance, **found})


def measured_against(plan: P, full: Plan, model: Denoiser) -> P:
    """The plan with what its budget was a share of in its provenance: steps and FLOPs per image of full compute."""
    baseline = {"steps": len(full.steps), "flops": full.cost(model).flops}
    return replace(plan, provenance={**plan.provenance, "baseline": baseline})


def confirm(
    results: Sequence[PlanResult], model: Denoiser, objective: Objective, progress: Progress | None = None
) -> PlanResult:
    """The best of `results` by a distributional objective on seeds that no planner has seen; the caller makes it so.

    Of plans whose scores are equal the cheaper wins. Returns that result with its confirmed quality; its settings keep
    what the planner itself believed, and the scores of all finalists.
    """
    if not results:
        raise PlanError("there is nothing to confirm: give at least one result")
    scored = []
    for i, result in enumerate(results):
        scored.append((objective(result.plan), result))
        if progress is not None:
            progress(i + 1, len(results), f"{result.planner} {scored[-1][0]}")
    score, best = min(scored, key=lambda row: (row[0].value, row[1].cost.flops))
    believed = {"objective": best.objective, "quality": None if best.quality is None else best.quality.to_dict()}
    finalists = [
        {"planner": r.planner, "plan": r.plan.digest(), "flops": r.cost.flops, "score": s.to_dict()} for s, r in scored
    ]
    settings = {**best.settings, "believed": believed, "confirmed_by": objective.describe(), "finalists": finalists}
    return replace(
        best,
        plan=planned(best.plan, best.planner, objective.name, score),
        cost=best.plan.cost(model),
        quality=score,
        objective=objective.name,
        settings=settings,
        evaluations=best.evaluations + len(results),
    )

"""AutoDiffusion: evolutionary search over times and the layers that each step skips (arXiv 2309.10438; sheet D, 6).

No training. First the times alone are searched, then layers too, up to a share per step that the search may skip. The
budget is in FLOPs, where the published one is in layers: what skipping saves buys more steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any

from pliant.compute import Compute
from pliant.compute.sites import format_sites
from pliant.errors import PlanError
from pliant.planning.evolution import Genes, Rules, evolve
from pliant.planning.genes import Record, Steps
from pliant.planning.racing import cheaper, journal_of, measured_before, search_plans, within
from pliant.planning.request import Request, search_planner
from pliant.planning.result import PlanResult
from pliant.planning.s3 import grids_of
from pliant.plans import Plan, Step
from pliant.plans.plan import made_for
from pliant.solvers import SolverLike, get_solver

RULES = Rules(population=16, parents=10, crossover=0.3, fresh=0.1)
REDRAW = 0.25
"""Probability that a mutation draws a step's time anew, as published: small shifts alone never leave a bad grid."""
TIMES_SHARE = 0.4
"""Of the evaluations and the time: for the first stage, times alone."""


@dataclass(frozen=True)
class Skipped:
    """Sites of one call, "R" or "K" each; at most a share of them is skipped."""

    sites: int
    most: int

    def sample(self, rng: Random) -> str:
        return self._with(rng.sample(range(self.sites), rng.randint(0, self.most)))

    def mutate(self, value: str, rng: Random) -> str:
        """One site more or fewer, or another one."""
        skipped = {k for k, letter in enumerate(value) if letter == "K"}
        if skipped and rng.random() < 0.5:
            skipped.discard(rng.choice(sorted(skipped)))
        if len(skipped) < self.most and rng.random() < 0.6:
            skipped.add(rng.randrange(self.sites))
        return self._with(skipped)

    def cross(self, a: str, b: str, rng: Random) -> str:
        return rng.choice((a, b))

    def _with(self, skipped: Any) -> str:
        return "".join("K" if k in skipped else "R" for k in range(self.sites))


@search_planner(evaluations=120)
def autodiffusion(
    request: Request,
    *,
    solver: SolverLike = "dpmpp-2m",
    most_skipped: float = 0.25,
) -> PlanResult:
    """Times and skipped layers within the budget.

    most_skipped: share of a step's residual branches that may be left out, 0..1. objective: None for the error to a
    converged teacher's samples. Raises PlanError for a share out of range, or a budget below one full step.
    """
    if not 0.0 <= most_skipped < 1.0:
        raise PlanError(f"most_skipped is {most_skipped!r}; expected a share of the layers, at least 0 and below 1")
    chosen = get_solver(solver)
    task = request.task("autodiffusion", solver=chosen.to_config(), most_skipped=most_skipped)
    model, effort = request.model, request.effort
    judge = request.objective or request.sample_error()
    sites = 2 * model.shape().depth
    limit = int(most_skipped * sites)
    count = task.most_steps(solver)
    room = count + max(1, int(count * limit / sites)) if limit else count
    full = "R" * sites
    base = task.uniform(count, solver)

    def decode(rows: list[dict[str, Any]]) -> Plan:
        made = [
            Step(row["t"], chosen, Compute(sites=format_sites(row["sites"]) if "K" in row["sites"] else None), task.cfg)
            for row in rows
        ]
        plan = Plan(tuple(made), model.path, base.end, made_for(model), provenance={"preset": "autodiffusion"})
        plan.check(model)
        return plan

    def mend(rows: list[dict[str, Any]], rng: Random) -> list[dict[str, Any]] | None:
        """Skip more, or fewer steps, until it fits."""
        for _ in range(4 * room):
            if task.fits(decode(rows)):
                return rows
            skip = [k for k, row in enumerate(rows) if row["sites"].count("K") < limit]
            if skip and rng.random() < 0.7:
                k = rng.choice(skip)
                runs = [j for j, letter in enumerate(rows[k]["sites"]) if letter == "R"]
                j = rng.choice(runs)
                rows = [
                    {**row, "sites": row["sites"][:j] + "K" + row["sites"][j + 1 :]} if i == k else row
                    for i, row in enumerate(rows)
                ]
            elif len(rows) > 1:
                k = rng.randrange(1, len(rows))
                rows = rows[:k] + rows[k + 1 :]
            else:
                return None
        return None

    start, end = base.times[0], base.end
    grids = grids_of(task, count)
    with_own = journal_of(task, effort, judge=judge.describe())
    try:
        effort = within(effort, judge, with_own)
        first = [[{"t": t, "sites": full} for t in grid] for grid in grids]
        moved: dict[str, Any] = {"start": start, "end": end, "redraw": REDRAW, "grids": grids}
        times_only = Steps(Record({"sites": Skipped(sites, 0)}), count, count, **moved)
        cheap = cheaper(judge, effort.num)
        early = evolve(
            Genes(times_only, mend),
            lambda rows: cheap(decode(rows)),
            max(1, int(TIMES_SHARE * effort.evaluations)),
            seconds=None if effort.seconds is None else TIMES_SHARE * effort.seconds,
            seed=request.seed,
            initial=first,
            rules=RULES,
            journal=with_own,
            progress=request.progress,
        )
        rest = max(1, effort.evaluations - len(early.history)) if limit else len(early.history)
        gene = Steps(Record({"sites": Skipped(sites, limit)}), max(1, count - 1), room, **moved)
        best = [e.candidate for e in early.ranked[: RULES.parents]]
        found = search_plans(
            task,
            judge,
            Genes(gene if limit else times_only, mend),
            decode,
            replace(effort, evaluations=rest, journal=None),
            seed=request.seed + 1,
            initial=best,
            rules=RULES,
            journal=with_own,
            spent=early.seconds,
        )
        return measured_before(found, early, len(best))
    finally:
        with_own.close()

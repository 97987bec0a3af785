"""Flexiffusion: schedules of equal segments, each one full step, some that reuse, and the rest skipped (sheet D, 7).

arXiv 2409.17566. A segment of L steps of the fine grid is: a full step, which fills the cache; `partial` steps that
recompute only the outer blocks (`branch` at each end) and take the middle from the cache; and null steps, which are
simply not there: the solver jumps over them. Judged by the distance to the teacher's own samples (rFID).
"""

from __future__ import annotations

from random import Random
from typing import Any

from pliant.compute import Compute, Reuse
from pliant.compute.sites import format_sites
from pliant.planning.evolution import Genes, Rules
from pliant.planning.genes import Integer, Listed, Record
from pliant.planning.racing import search_plans
from pliant.planning.relative import RelativeObjective
from pliant.planning.request import Request, search_planner
from pliant.planning.result import PlanResult
from pliant.planning.task import Task
from pliant.plans import Plan, Step
from pliant.plans.plan import made_for
from pliant.solvers import SolverLike, get_solver

RULES = Rules(population=16, parents=8, crossover=0.3, fresh=0.1)
LONGEST = 4
"""Partial steps of a segment, at most."""


class Segments:
    """Candidates {"segments": N, "branch": [...], "partial": [...]}; the lists belong to the longest N."""

    def __init__(self, fewest: int, most: int, branches: int, partial: int) -> None:
        self.fewest, self.most = fewest, most
        self.gene = Record(
            {
                "segments": Integer(fewest, most),
                "branch": Listed(Integer(1, branches), most, 0.25),
                "partial": Listed(Integer(0, partial), most, 0.25),
            },
            0.4,
        )

    def sample(self, rng: Random) -> Any:
        return self.gene.sample(rng)

    def mutate(self, value: Any, rng: Random) -> Any:
        return self.gene.mutate(value, rng)

    def cross(self, a: Any, b: Any, rng: Random) -> Any:
        """Segment by segment."""
        picks = [rng.random() < 0.5 for _ in range(self.most)]
        mixed = {
            name: [x if first else y for x, y, first in zip(a[name], b[name], picks, strict=True)]
            for name in ("branch", "partial")
        }
        return {"segments": rng.choice((a, b))["segments"], **mixed}


def segment_plan(task: Task, value: dict[str, Any], solver: SolverLike = "dpmpp-2m", fine: int | None = None) -> Plan:
    """A candidate's plan, on a fine grid of the path's default with `fine` steps, by default the task's.

    partial steps beyond a segment's length are left out.
    """
    model, chosen = task.model, get_solver(solver)
    grid = task.uniform(fine or task.steps).times
    depth = model.shape().depth
    count = int(value["segments"])
    edges = [round(k * (len(grid) - 1) / count) for k in range(count + 1)]
    rows: list[Step] = []
    for k in range(count):
        active = min(int(value["partial"][k]), edges[k + 1] - edges[k] - 1)
        edge = 2 * min(int(value["branch"][k]), (depth - 1) // 2)
        middle = 2 * depth - 2 * edge
        full, partial = Compute(), Compute()
        if active > 0 and middle > 0:
            full = Compute(write=(f"span({edge},{edge + middle})",))
            letters = "R" * edge + "C" * middle + "R" * edge
            partial = Compute(sites=format_sites(letters), reuse=Reuse("span"))
        # Active steps are spread over the segment: what is null lies evenly between them.
        length = edges[k + 1] - edges[k]
        places = [edges[k] + round(j * length / (active + 1)) for j in range(active + 1)]
        rows += [Step(grid[p], chosen, full if j == 0 else partial, task.cfg) for j, p in enumerate(places)]
    plan = Plan(tuple(rows), model.path, grid[-1], made_for(model), provenance={"preset": "flexiffusion", **value})
    plan.check(model)
    return plan


@search_planner(evaluations=120)
def flexiffusion(
    request: Request,
    *,
    solver: SolverLike = "dpmpp-2m",
) -> PlanResult:
    """Segments within the budget.

    objective: None for the distance to the samples of full compute from the same seeds, in features without weights;
    for a trained extractor's, give `RelativeObjective(model, full, extractor)`.
    """
    chosen = get_solver(solver)
    task = request.task("flexiffusion", solver=chosen.to_config())
    judge = request.objective or RelativeObjective(task.model, task.full())
    most = task.most_steps(chosen)
    depth = task.model.shape().depth
    space = Segments(max(1, most // 3), most, max(1, (depth - 1) // 2), LONGEST)

    def mend(value: dict[str, Any], rng: Random) -> dict[str, Any] | None:
        value = {k: list(v) if isinstance(v, list) else v for k, v in value.items()}
        for _ in range(8 * most):
            # Segments that are not there say nothing: one spelling of each schedule.
            for name, silent in (("branch", 1), ("partial", 0)):
                value[name][value["segments"] :] = [silent] * (most - value["segments"])
            if task.fits(segment_plan(task, value, chosen)):
                return value
            active = [k for k in range(value["segments"]) if value["partial"][k] > 0]
            if active and rng.random() < 0.7:
                value["partial"][rng.choice(active)] -= 1
            elif value["segments"] > 1:
                value["segments"] -= 1
            else:
                return None
        return None

    blank = {"branch": [1] * most, "partial": [0] * most}
    initial = [{"segments": n, **blank} for n in sorted({most, max(1, most - 1), max(1, 2 * most // 3)}, reverse=True)]
    for n in (most, max(1, most // 2)):
        initial += [{"segments": n, "branch": [1] * most, "partial": [p] * most} for p in (1, 2)]
    return search_plans(
        task,
        judge,
        Genes(space, mend),
        lambda value: segment_plan(task, value, chosen),
        request.effort,
        seed=request.seed,
        initial=initial,
        rules=RULES,
    )

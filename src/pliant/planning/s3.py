"""S³: predictor-guided evolutionary search over solver schedules (arXiv 2312.07243; sheet D, section 4).

Every step may have its own order, prediction kind, derivative estimate, scaling and corrector (`pliant.solvers.USF`),
and its own time. Compute and guidance are those of the all-powerful plan: only the solver is searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from pliant.paths import Path
from pliant.planning.evolution import Evaluated, Genes, Predict, Rules
from pliant.planning.genes import Categorical, Real, Record, Steps
from pliant.planning.predictor import fit_ranker
from pliant.planning.racing import search_plans
from pliant.planning.request import Request, search_planner
from pliant.planning.result import PlanResult
from pliant.planning.task import Task
from pliant.plans import Plan, Step
from pliant.plans.plan import made_for
from pliant.solvers import USF

ORDERS, ORDER_WEIGHTS = (1, 2, 3, 4), (0.2, 0.4, 0.3, 0.1)
SCALES = ("none", "linear", "midpoint", "bh1", "plus-exp", "minus-exp")
GENES = Record(
    {
        "order": Categorical(ORDERS, ORDER_WEIGHTS),
        "form": Categorical(("sample", "epsilon")),
        "nodes": Categorical((1, 2)),
        "scale": Categorical(SCALES, (0.3, 0.3, 0.2, 0.1, 0.05, 0.05)),
        "kappa": Real(-0.5, 0.5, 0.05),
        "corrector": Categorical(("none", "pseudo")),
    }
)
"""Options and probabilities of sheet D; "nodes": how many outputs estimate the first derivative, at most the order."""
RULES = Rules(population=12, parents=15, crossover=0.3, fresh=0.05)
LEAST_KNOWN, RANKED = 24, 64
"""Schedules that must be measured before the predictor is asked; it learns from so many, the best: what is bred is near
those, and telling bad ones apart is of no use."""


def named(order: int, form: str, scale: str = "none", corrector: str = "none", nodes: int = 2) -> dict[str, Any]:
    """Genes of a step of a named solver."""
    return {"order": order, "form": form, "nodes": nodes, "scale": scale, "kappa": 0.0, "corrector": corrector}


NAMED: dict[str, dict[str, Any]] = {
    "ddim": named(1, "sample"),
    "dpmpp-2m": named(2, "sample", "midpoint"),
    "dpm-2m": named(2, "epsilon", "midpoint"),
    "dpmpp-3m": named(3, "sample"),
    "deis-3": named(3, "epsilon"),
    "unipc-2": named(2, "sample", "midpoint", "pseudo"),
    "unipc-3": named(3, "sample", "none", "pseudo"),
    "low-order": named(3, "sample", "none", "none", 1),
}
"""Where the search starts, on the path's default times and on shifted ones."""


def started(grid: Sequence[float], row: dict[str, Any]) -> list[dict[str, Any]]:
    """A named solver on a grid, its order lowered towards the end as the named ones do."""
    n = len(grid)
    return [{"t": t, **row, "order": min(int(row["order"]), n - k)} for k, t in enumerate(grid)]


def usf_of(row: dict[str, Any], known: int = 4) -> USF:
    """A step's solver. "linear" scaling with its kappa; the first derivative from `nodes` outputs, others from all.

    known: outputs that can be interpolated at this step, its own included; the order is cut to it.
    """
    order = min(int(row["order"]), max(1, known))
    newest = tuple(range(1, order))
    first = newest[: int(row["nodes"])]
    stencils = (first, *[newest] * (order - 2)) if order > 1 else ()
    kappa = float(row["kappa"]) if row["scale"] == "linear" else 0.0
    return USF(order, row["form"], 1, stencils, row["scale"], kappa, row["corrector"])


def schedule(path: Path, rows: Sequence[dict[str, Any]]) -> list[USF]:
    """The solvers of all steps. Where there is no signal at the start, its output has no log-SNR and is left out."""
    blind = int(float(path.alpha_sigma(rows[0]["t"]).alpha) == 0.0)
    return [usf_of(row, k + 1 - blind if k else 1) for k, row in enumerate(rows)]


def features_of(path: Path, rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """One row of numbers per step: log-SNR, time, order, kind, scaling, kappa, nodes, corrector."""
    out = []
    for row in rows:
        t = min(max(float(row["t"]), 1e-3), 1.0 - 1e-3)
        out.append(
            [
                float(path.log_snr(t)),
                t,
                *(float(row["order"] == k) for k in ORDERS),
                float(row["form"] == "epsilon"),
                *(float(row["scale"] == k) for k in SCALES),
                float(row["kappa"]) if row["scale"] == "linear" else 0.0,
                float(row["nodes"]),
                float(row["corrector"] == "pseudo"),
            ]
        )
    return out


@search_planner(evaluations=120)
def s3(
    request: Request,
    *,
    predictor: bool = True,
) -> PlanResult:
    """As many full steps as the budget pays for, each with its own solver decisions.

    objective: None for the error to a converged teacher's samples. predictor: screen candidates by a ranking network.
    """
    task, model, seed = request.task("s3", predictor=predictor), request.model, request.seed
    judge = request.objective or request.sample_error()
    count = task.most_steps()
    base = task.uniform(count)

    def decode(rows: list[dict[str, Any]]) -> Plan:
        solvers = schedule(model.path, rows)
        chosen = tuple(Step(r["t"], s, guidance=task.cfg) for r, s in zip(rows, solvers, strict=True))
        plan = Plan(chosen, model.path, base.end, made_for(model), provenance={"preset": "usf"})
        plan.check(model)
        return plan

    def mend(rows: list[dict[str, Any]], rng: Random) -> list[dict[str, Any]] | None:
        """Lower orders until it fits: of the same FLOPs, a sum of more terms takes longer."""
        while not task.fits(decode(rows)):
            high = [k for k, row in enumerate(rows) if row["order"] > 1 or row["corrector"] != "none"]
            if not high:
                return None
            k = rng.choice(high)
            lower = {"order": rows[k]["order"] - 1} if rows[k]["order"] > 1 else {"corrector": "none"}
            rows = [*rows[:k], {**rows[k], **lower}, *rows[k + 1 :]]
        return rows

    grids = grids_of(task, count)
    gene = Steps(GENES, count, count, base.times[0], base.end, grids=grids)
    initial = [started(grid, row) for grid in grids for row in NAMED.values()]

    def screen(history: Sequence[Evaluated], rng: Random) -> Predict | None:
        known = [e for e in history if e.value < float("inf")]
        if len(known) < LEAST_KNOWN:
            return None
        worst = sorted(e.value for e in known)[:RANKED][-1]
        known = [e for e in known if e.value <= worst]
        rank = fit_ranker(
            [features_of(model.path, e.candidate) for e in known], [e.value for e in known], rng.randrange(10**6)
        )
        return lambda rows: rank([features_of(model.path, rows)])[0]

    rules = RULES
    return search_plans(
        task,
        judge,
        Genes(gene, mend if task.budget.unit == "seconds" else None),
        decode,
        request.effort,
        seed=seed,
        initial=initial,
        rules=rules,
        screen=screen if predictor else None,
    )


def grids_of(task: Task, count: int) -> list[list[float]]:
    """Starts of `count` steps: the path's default, and shifted towards noise and towards data."""
    first = task.uniform(count)
    start, end = first.times[0], first.end
    shares = [(t - end) / (start - end) for t in first.times[:-1]]
    return [
        [end + (start - end) * shift * u / (1.0 + (shift - 1.0) * u) for u in shares] for shift in (1.0, 0.5, 2.0)
    ]

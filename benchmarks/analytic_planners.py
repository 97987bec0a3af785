"""What every planner without evolution finds on the digits model at a budget, what its search cost, and its distance.

    python benchmarks/analytic_planners.py --budget 10% --out docs/planners-analytic.json

Full compute is 50 full steps, classifier-free guidance 1.5. Planners of times and coefficients choose by the error to a
teacher's samples (64), those that choose between computes by the Frechet distance of 300 images; all are then measured
on images with seeds that no search has seen, 3 sets of `--num`. Rows already in the file are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import pliant
from pliant.evaluation import get_extractor, load_reference
from pliant.files import write_json
from pliant.planning import PLANNERS, FrechetObjective, SampleError, TeacherSettings, get_planner
from pliant.planning.objective import Objective
from pliant.planning.task import Task
from pliant.plans import Plan

GUIDANCE, STEPS, REPEATS = 1.5, 50, 3
BY_DISTANCE = ("weak-split", "spectral", "joint")
OWN = ("weak-split", "spectral", "boss", "gits", "oss", "olss", "dc-solver", "ld3", "joint")
BASELINES = ("ddim", "dpmpp-2m", "unipc-2", "heun")


class Bench:
    """The digits model with everything that is measured on it."""

    def __init__(self, num: int) -> None:
        self.model = pliant.load("digits")
        self.extractor = get_extractor("digits-classifier")
        self.reference = load_reference("digits", self.extractor)
        self.proxy = SampleError(self.model, TeacherSettings(60, guidance=GUIDANCE), range(500_000, 500_064))
        self.distance = FrechetObjective(self.model, self.reference, self.extractor, 300, first_seed=600_000)
        self.fresh = [self.distance.on_fresh_seeds(num, repeat) for repeat in range(REPEATS)]

    def row(self, name: str, plan: Plan, budget: str, evaluations: int = 0, seconds: float = 0.0) -> dict[str, Any]:
        values = [objective(plan).value for objective in self.fresh]
        return {
            "name": name,
            "budget": budget,
            "share": plan.cost(self.model).flops / Plan.uniform(self.model, STEPS, guidance=GUIDANCE).cost(self.model).flops,
            "steps": len(plan.steps),
            "weak": sum(step.compute.patch is not None for step in plan.steps),
            "guided": sum(step.guidance is not None for step in plan.steps),
            "solver": plan.steps[0].solver.name,
            "times": [round(t, 4) for t in plan.times],
            "proxy": self.proxy(plan).value,
            "distances": values,
            "distance": statistics.mean(values),
            "spread": statistics.stdev(values),
            "images": self.fresh[0].num,
            "evaluations": evaluations,
            "cpu_seconds": seconds,
        }


def baselines(bench: Bench, budget: str) -> dict[str, Plan]:
    """Fewer steps of named solvers, at full compute."""
    found = {}
    for solver in BASELINES:
        task = Task.begin(solver, bench.model, budget, None, STEPS, GUIDANCE, 0, None)
        found[f"{solver} alone"] = task.uniform(task.most_steps(solver), solver)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", default="10%")
    parser.add_argument("--planners", nargs="*", default=[n for n in OWN if n in PLANNERS])
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("docs/planners-analytic.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    done = {(row["name"], row["budget"]) for row in rows}
    bench = Bench(args.num)

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        write_json(args.out, {"model": "digits", "guidance": GUIDANCE, "full_steps": STEPS, "rows": rows})
        print(f"{row['budget']:>4} {row['name']:<16} {row['distance']:.3f} +- {row['spread']:.3f}", flush=True)

    for name, plan in baselines(bench, args.budget).items():
        if (name, args.budget) not in done:
            keep(bench.row(name, plan, args.budget))
    for name in args.planners:
        if (name, args.budget) in done:
            continue
        objective: Objective = bench.distance if name in BY_DISTANCE else bench.proxy
        started = time.process_time()
        found = get_planner(name)(bench.model, args.budget, objective=objective, steps=STEPS, guidance=GUIDANCE)
        seconds = time.process_time() - started
        keep(bench.row(name, found.plan, args.budget, found.evaluations, seconds))


if __name__ == "__main__":
    main()

"""Plans that ship with a model, from the table of `planners.py`: `auto`'s, with what it is worth on fresh seeds.

    python benchmarks/presets.py --table benchmarks/results/planners-digits.json \
        --output src/pliant/assets/digits/plans

A budget's plan is `auto`'s row. Its quality is the mean over the table's three sets of seeds, which chose nothing; the
closed form that the plan replaces is measured on the same seeds, and the paired difference is stored beside it. A plan
that is worse than the closed form, beyond the 90 % interval of that difference, is not written.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from planners import SETS, Bench, pooled, score_of

from pliant import Plan
from pliant.planning.closed_form import closed_form
from pliant.planning.result import PlanResult, planned
from pliant.planning.task import Task
from pliant.planning.teacher import weights_of


def preset(bench: Bench, budget: float) -> tuple[PlanResult, str]:
    """The stored result for a budget, and a line that says what it is."""
    row = bench.rows[f"{budget:g}: auto"]
    plan, guidance = Plan.from_dict(row["plan"]), bench.args.guidance
    cfg = None if guidance == 1.0 else guidance
    closed = closed_form(Task.begin("closed-form", bench.model, budget, None, bench.args.steps, cfg, 0, None)).plan
    scores, gaps = [], []
    for k in range(SETS):
        for each in (plan, closed):
            bench.features(each, k)
        scores.append(bench.sets[k](closed))
        gaps.append(bench.sets[k].difference(plan, closed))
    quality, gap = score_of(row), pooled(gaps)
    name = bench.tune.name
    seeds = [o.describe() for o in bench.sets]
    settings: dict[str, Any] = {
        "budget": f"{100 * budget:g}%", "steps": bench.args.steps, "guidance": cfg, "seed": 0,
        "weights_sha256": weights_of(bench.model), "objective": bench.judge.describe(), "searched_on": bench.tune.describe(),
        "confirmed_by": {**seeds[0], "images": sum(s["images"] for s in seeds), "seeds": [s["seeds"] for s in seeds]},
        "closed_form": {
            "steps": len(closed.steps), "flops": closed.cost(bench.model).flops, "score": pooled(scores).to_dict(),
            "against": gap.to_dict(),
        },
    }  # fmt: skip
    found = PlanResult(
        planned(replace(plan, provenance=_short(plan.provenance)), "auto", name, quality),
        plan.cost(bench.model), quality, name, "auto", settings, row["tuned_on"], row["tuning_seconds"],
    )  # fmt: skip
    return found, f"{budget:.0%}: auto {quality}, closed form {pooled(scores)}, difference {gap}"


def _short(provenance: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in provenance.items() if k in ("preset", "fitted", "caching")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="JSON written by planners.py; features beside it")
    parser.add_argument("--output", type=Path, required=True, help="folder of the plans")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    args = parser.parse_args()
    settings = json.loads(args.table.read_text())["settings"]
    loose = {"device": "cpu", "again": [], "budgets": args.budgets, "output": str(args.table)}
    bench = Bench(argparse.Namespace(**settings, **loose))
    args.output.mkdir(parents=True, exist_ok=True)
    for budget in args.budgets:
        found, text = preset(bench, budget)
        worse = found.settings["closed_form"]["against"]["low"] > 0.0
        print(text, "(not written: worse)" if worse else "", flush=True)
        if not worse:
            found.save(args.output / f"auto-{100 * budget:g}.json")


if __name__ == "__main__":
    main()

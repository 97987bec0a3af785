"""What a plan per class is worth: planner `router` against the best single plan it knew, on seeds that chose nothing.

    OMP_NUM_THREADS=1 python benchmarks/routing.py MODEL --budgets 5% 10% 20% --guidance 1.5 --sets 3 --num 256

Distances are those to full compute's samples (`RelativeObjective`), with 90 % intervals; the difference is paired.
"""

from __future__ import annotations

import argparse

import pliant
from pliant.planning import Score, default_objective, get_planner
from pliant.plans import Plan, RoutedPlans


class Fond:
    """An objective that always prefers one kind: both finalists are wanted here, to be compared."""

    def __init__(self, kind: type) -> None:
        self.kind, self.name = kind, f"any {kind.__name__}"

    def describe(self) -> dict[str, str]:
        return {"objective": self.name}

    def __call__(self, plan: object) -> Score:
        value = 0.0 if isinstance(plan, self.kind) else 1.0
        return Score(value, value, value)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--budgets", nargs="+", default=["5%", "10%", "20%"])
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--per-class", type=int, default=16)
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--num", type=int, default=256)
    return parser.parse_args()


def main() -> None:
    args = parse()
    model = pliant.load(args.model)
    judge = default_objective(model, args.steps, args.guidance, args.num)
    fresh = [judge.on_fresh_seeds(repeat=repeat + 1) for repeat in range(args.sets)]
    print("| budget | seeds | one plan | a plan per class | difference | FLOPs of one, of the mean |\n|---|---|---|---|---|---|")
    for budget in args.budgets:
        shared = {"steps": args.steps, "guidance": args.guidance, "num": args.per_class}
        found = get_planner("router")(model, budget, objective=Fond(RoutedPlans), **shared)
        known = get_planner("router")(model, budget, objective=Fond(Plan), **shared)
        if not isinstance(found.plan, RoutedPlans):
            print(f"| {budget} | | every class takes {found.single.digest()} | | | |")
            continue
        share = [result.cost.flops / judge.full.cost(model).flops for result in (known, found)]
        for number, objective in enumerate(fresh):
            one, several = objective(known.plan), objective(found.plan)
            difference = objective.difference(found.plan, known.plan)
            print(f"| {budget} | {number} | {one} | {several} | {difference} | {share[0]:.1%}, {share[1]:.1%} |", flush=True)


if __name__ == "__main__":
    main()

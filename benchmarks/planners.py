"""`auto` against every single technique at the same FLOPs, each tuned by its own planner, on fresh seeds.

    python benchmarks/planners.py --model digits --reference digits --extractor digits-classifier --guidance 1.5 \
        --budgets 0.1 0.05 0.2 0.4 --num 500 --output benchmarks/results/planners-digits.json
    python benchmarks/planners.py --smoke          a minute, to see that it runs

Budgets are shares of the FLOPs of the all-powerful baseline: `--steps` steps of dpmpp-2m at full compute, guided. Every
technique chooses its plan on `--tune` images with the seeds 0, 1, ... by the Fréchet distance to the reference; those
that search decide between their finalists on four times as many. `auto` starts from closed forms, from the other
techniques' winners, and from what it found for smaller budgets. Then every plan is measured on three sets of `--num`
images that no planner has seen, the same for all plans.

A row's distance is the mean of the three sets; its 90 % interval is by bootstrap over the images of each set. "Against
auto" is the difference on the same seeds, where what plans share cancels, with its own 90 % interval.
Finished plans and sets are kept in the output file after each, so that an interrupted run goes on where it stopped. A
technique that has nothing to offer at a budget is left out, with the reason. Writes JSON, Markdown and a plot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import pliant
from pliant import Denoiser, Plan, PliantError
from pliant.evaluation import get_extractor, load_reference
from pliant.files import write_json
from pliant.planning import PLANNERS, FrechetObjective, Score
from pliant.planning.openings import INTERVALS, guided_part, most
from pliant.planning.plan_space import CACHES
from pliant.planning.task import Task

LOOSE = ("output", "device", "budgets", "techniques", "without", "again", "auto_evaluations", "smoke", "baseline")
"""Options that may change when a run is resumed; a row of `auto` says how many plans it measured."""
SETS = 3
FIRST_SEED = 2_000_000
"""Of the sets that rows are measured on: planners confirm their finalists on seeds from 1,000,000,000."""
SOLVERS = ("dpmpp-2m", "unipc-3", "dpmpp-3m", "deis-2")
SEARCHED = ("s3", "autodiffusion", "flexiffusion")
DIRECT = ("weak-split", "boss", "gits", "oss", "olss", "dc-solver", "ld3", "spectral", "joint")
Row = dict[str, Any]


class Bench:
    """One model, its measures, and the rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model: Denoiser = pliant.load(args.model)
        self.model.network.requires_grad_(False)
        self.model = self.model.to(args.device)
        extractor = get_extractor(args.extractor)
        size = tuple(args.size) if args.size else None
        reference = load_reference(args.reference, extractor, size=size)
        self.tune = FrechetObjective(self.model, reference, extractor, args.tune)
        self.judge = FrechetObjective(self.model, reference, extractor, 4 * args.tune)
        self.sets = [
            FrechetObjective(self.model, reference, extractor, args.num, FIRST_SEED + k * args.num) for k in range(SETS)
        ]
        self.full = Plan.uniform(self.model, args.steps, guidance=args.guidance)
        self.output = Path(args.output)
        settings = {k: v for k, v in vars(args).items() if k not in LOOSE}
        done = json.loads(self.output.read_text()) if self.output.exists() else {}
        if {k: (done.get("settings") or {}).get(k) for k in settings} != settings:
            done = {"settings": settings, "metric": self.tune.name, "rows": {}}
        redone = [f"{b:g}: {name}" for b in args.budgets for name in args.again]
        done["rows"] = {k: r for k, r in done["rows"].items() if k not in redone}
        self.done: dict[str, Any] = done
        self.rows: dict[str, Row] = done["rows"]

    def save(self) -> None:
        write_json(self.output, self.done)

    # Plans ----------------------------------------------------------------------------------------------------------

    def techniques(self, budget: float) -> dict[str, Callable[[], tuple[Plan, int]]]:
        """Name -> a function that chooses the plan and says how many plans it measured."""
        task = Task.begin("bench", self.model, budget, None, self.args.steps, self.args.guidance, 0, None)
        cfg, model = task.cfg, self.model
        common: dict[str, Any] = {"objective": self.tune, "steps": self.args.steps, "guidance": self.args.guidance}

        def direct(name: str) -> Callable[[], tuple[Plan, int]]:
            def run() -> tuple[Plan, int]:
                found = PLANNERS[name](model, budget, **common)
                return found.plan, found.evaluations

            return run

        def searched(name: str, evaluations: int, **options: Any) -> Callable[[], tuple[Plan, int]]:
            def run() -> tuple[Plan, int]:
                found = PLANNERS[name](
                    model, budget, **{**common, "objective": self.judge}, evaluations=evaluations,
                    seconds=self.args.seconds, num=self.args.tune, **options,
                )  # fmt: skip
                return found.plan, found.evaluations

            return run

        def best_of(layouts: list[Callable[[int], Plan]]) -> Callable[[], tuple[Plan, int]]:
            def run() -> tuple[Plan, int]:
                plans = [p for p in (most(task, layout) for layout in layouts) if p is not None]
                if not plans:
                    raise PliantError("nothing fits the budget")
                return min(plans, key=lambda p: self.tune(p).value), len(plans)

            return run

        def uniform(solver: str) -> Callable[[int], Plan]:
            return lambda n: Plan.uniform(model, n, solver, guidance=cfg)

        def interval(i: tuple[float, float]) -> Callable[[int], Plan]:
            return lambda n: guided_part(Plan.uniform(model, n, guidance=cfg), *i)

        def scaled(factor: float) -> Callable[[int], Plan]:
            further = None if cfg is None else replace(cfg, scale=1.0 + factor * (cfg.scale - 1.0))
            return lambda n: Plan.uniform(model, n, guidance=further)

        def cached(c: dict[str, Any]) -> Callable[[int], Plan]:
            return lambda n: Plan.uniform(model, n, guidance=cfg).cached(model, **c)

        found = {f"fewer steps, {s}": best_of([uniform(s)]) for s in SOLVERS}
        if cfg is not None:
            found["guidance interval"] = best_of([interval(i) for i in INTERVALS])
            found["guidance scale"] = best_of([scaled(f) for f in (1.0, 2.0, 4.0, 8.0, 16.0)])
        found["best cache preset"] = best_of([cached(c) for c in CACHES])
        found.update({name: direct(name) for name in DIRECT if name in PLANNERS})
        found.update({name: searched(name, self.args.evaluations, finalists=3) for name in SEARCHED if name in PLANNERS})

        def auto() -> tuple[Plan, int]:
            others = [
                r for r in self.rows.values()
                if (r["budget"] == budget) != r["technique"].startswith("auto") and r["budget"] <= budget
            ]  # fmt: skip
            starts = [Plan.from_dict(r["plan"]) for r in others if r.get("plan")]
            return searched("auto", self.args.auto_evaluations, starts=starts)()

        found["auto"] = auto
        wanted, unwanted = self.args.techniques, self.args.without
        found = {k: v for k, v in found.items() if not wanted or any(named(k, w) for w in wanted)}
        return {k: v for k, v in found.items() if not any(named(k, w) for w in unwanted)}

    def plan(self, budget: float, name: str, choose: Callable[[], tuple[Plan, int]]) -> Row:
        """The row with its plan, chosen now unless it is there."""
        key = f"{budget:g}: {name}"
        if key not in self.rows:
            begun, row = time.perf_counter(), {"budget": budget, "technique": name}
            try:
                plan, evaluations = choose()
            except PliantError as error:
                self.rows[key] = {**row, "left_out": str(error)}
            else:
                cost = plan.cost(self.model)
                self.rows[key] = {
                    **row,
                    "plan": plan.to_dict(),
                    "steps": len(plan.steps),
                    "share": cost.flops / self.full.cost(self.model).flops,
                    "flops": cost.flops,
                    "tuned": self.tune(plan).value,
                    "tuned_on": evaluations,
                    "tuning_seconds": time.perf_counter() - begun,
                    "sets": {},
                }
            self.save()
        return self.rows[key]

    # Measures -------------------------------------------------------------------------------------------------------

    def features(self, plan: Plan, k: int) -> None:
        """Sample a plan on set k, or read the features an earlier run left."""
        file = self.output.with_suffix("") / f"{plan.digest()}-{k}.safetensors"
        objective, digest = self.sets[k], plan.digest()
        if digest not in objective._features and file.exists():
            objective._features[digest] = load_file(file)["features"]
        if digest not in objective._features:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"features": objective.features(plan).contiguous()}, file)

    def measure(self, row: Row) -> None:
        if "plan" not in row:
            return
        plan = Plan.from_dict(row["plan"])
        for k in range(SETS):
            if str(k) not in row["sets"]:
                self.features(plan, k)
                row["sets"][str(k)] = self.sets[k](plan).to_dict()
                self.save()

    def against(self, row: Row, auto: Row) -> Score:
        """How much worse than auto, over the three sets."""
        plan, best = Plan.from_dict(row["plan"]), Plan.from_dict(auto["plan"])
        scores = []
        for k in range(SETS):
            self.features(plan, k)
            self.features(best, k)
            scores.append(self.sets[k].difference(plan, best))
        return pooled(scores)


def named(technique: str, word: str) -> bool:
    """Whether a word means a technique: a part of its name, "auto" only itself."""
    return word == technique if word == "auto" else word in technique


def pooled(scores: list[Score]) -> Score:
    """The mean of independent scores; half-widths add in squares."""
    mean = statistics.fmean(s.value for s in scores)
    half = sum(((s.high - s.low) / 2) ** 2 for s in scores) ** 0.5 / len(scores)
    return Score(mean, mean - half, mean + half, sum(s.samples for s in scores))


def score_of(row: Row) -> Score:
    """The row's distance. A set's own interval may be cut at 0; its upper half says its width."""
    scores = [Score.from_dict(s) for s in row["sets"].values()]
    return pooled([Score(s.value, 2 * s.value - s.high, s.high, s.samples) for s in scores])


def verdict(gap: Score) -> str:
    return "worse" if gap.low > 0 else "better" if gap.high < 0 else "level"


def table(bench: Bench, budgets: list[float]) -> str:
    lines = []
    full = bench.rows.get("baseline")
    if full is not None and len(full["sets"]) == SETS:
        lines += [f"All-powerful baseline, {full['steps']} steps: {score_of(full)}", ""]
    for budget in budgets:
        rows = [r for r in bench.rows.values() if r["budget"] == budget and len(r.get("sets", ())) == SETS]
        auto = next((r for r in rows if r["technique"] == "auto"), None)
        if not rows:
            continue
        lines += [
            f"### {budget:.0%} of the baseline's FLOPs", "",
            f"| technique | steps | FLOPs | {bench.tune.name}, mean [90 %] | three sets | against auto [90 %] | than auto |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in sorted(rows, key=lambda r: score_of(r).value):
            sets = ", ".join(f"{s['value']:.3f}" for s in row["sets"].values())
            gap = bench.against(row, auto) if auto is not None and row is not auto else None
            row["against_auto"] = None if gap is None else gap.to_dict()
            compared = "| | |" if gap is None else f"| {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] | {verdict(gap)} |"
            name = f"**{row['technique']}**" if row is auto else row["technique"]
            s = score_of(row)
            lines.append(
                f"| {name} | {row['steps']} | {row['share']:.1%} | {s.value:.3f} [{s.low:.3f}, {s.high:.3f}] | {sets} {compared}"
            )
        missing = [r for r in bench.rows.values() if r["budget"] == budget and "left_out" in r]
        lines += ["", *(f"Left out: {r['technique']}: {r['left_out']}" for r in missing), ""]
    return "\n".join(lines) + "\n"


def plot(bench: Bench, budgets: list[float], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9.5, 5))
    names = dict.fromkeys(r["technique"] for r in bench.rows.values() if r["budget"] in budgets)
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for number, name in enumerate(names):
        rows = sorted(
            (r for r in bench.rows.values() if r["technique"] == name and len(r.get("sets", ())) == SETS),
            key=lambda r: r["budget"],
        )
        if rows:
            scores = [score_of(r) for r in rows]
            strong = name == "auto"
            axis.errorbar(
                [100 * r["budget"] for r in rows], [s.value for s in scores],
                [(s.high - s.low) / 2 for s in scores], marker="o" if strong else ".", capsize=3, label=name,
                linewidth=2.5 if strong else 0.9, color="black" if strong else colours[number % 10],
                linestyle="-" if number < 10 or strong else "--", zorder=5 if strong else 2,
            )  # fmt: skip
    full = bench.rows.get("baseline")
    if full is not None and len(full["sets"]) == SETS:
        axis.axhline(score_of(full).value, color="grey", linestyle=":", label=f"baseline, {full['steps']} steps")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks([100 * b for b in sorted(budgets)], [f"{b:.0%}" for b in sorted(budgets)])
    axis.minorticks_off()
    low, high = axis.get_ylim()
    marks = [m * 10.0**k for k in range(-3, 4) for m in (1, 2, 3, 4, 5, 6, 8)]
    axis.set_yticks([m for m in marks if low <= m <= high], [f"{m:g}" for m in marks if low <= m <= high])
    axis.set_xlabel("FLOPs, share of the all-powerful baseline")
    axis.set_ylabel(f"{bench.tune.name}, 90 % interval")
    folder = Path(bench.args.model)
    title = folder.parent.name if folder.name == "model" else folder.name
    axis.set_title(f"{title}: {SETS} x {bench.args.num} images", fontsize=10)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))  # beside the lines, not over them
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--reference", default="digits")
    parser.add_argument("--extractor", default="digits-classifier")
    parser.add_argument("--size", type=int, nargs=2, help="height and width of reference images from Parquet or folders")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--steps", type=int, default=50, help="of the all-powerful baseline")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.05, 0.2, 0.4])
    parser.add_argument("--num", type=int, default=500, help="images per fresh set")
    parser.add_argument("--tune", type=int, default=128, help="images per measurement while planners choose")
    parser.add_argument("--evaluations", type=int, default=48, help="of every searching technique")
    parser.add_argument("--auto-evaluations", type=int, default=120)
    parser.add_argument("--seconds", type=float, help="at most so long per search")
    parser.add_argument("--techniques", nargs="*", help="only those with one of these words in their names; auto is one")
    parser.add_argument("--without", nargs="*", default=[], help="not those whose names contain one of these words")
    parser.add_argument("--again", nargs="*", default=[], help="techniques, by their whole names, to plan anew")
    parser.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny numbers: only to see that it runs")
    parser.add_argument("--output", default="benchmarks/results/planners.json")
    args = parser.parse_args()
    if args.smoke:
        args.num, args.tune, args.evaluations, args.auto_evaluations, args.steps = 20, 20, 3, 45, 20
        args.budgets, args.techniques = [0.1], args.techniques or ["dpmpp-2m", "weak-split", "interval", "s3", "auto"]
        args.output = "/tmp/planners-smoke.json"
        Path(args.output).unlink(missing_ok=True)

    bench = Bench(args)
    # All plans of a budget first, then their measures: an early stop leaves whole budgets.
    for budget in args.budgets:
        for name, choose in bench.techniques(budget).items():
            row = bench.plan(budget, name, choose)
            bench.measure(row)
            text = row.get("left_out") or f"{row['share']:.1%} tuned {row['tuned']:.3f}, fresh {score_of(row)}"
            print(f"{budget:.0%} {name:24s} {text}", flush=True)
        bench.output.with_suffix(".md").write_text(table(bench, args.budgets), encoding="utf-8")
        bench.save()
    if args.baseline:
        if "baseline" not in bench.rows:
            bench.rows["baseline"] = {
                "budget": 1.0, "technique": "baseline", "plan": bench.full.to_dict(), "steps": args.steps, "share": 1.0,
                "flops": bench.full.cost(bench.model).flops, "tuned": None, "sets": {},
            }  # fmt: skip
        bench.measure(bench.rows["baseline"])
    bench.output.with_suffix(".md").write_text(table(bench, args.budgets), encoding="utf-8")
    bench.save()
    plot(bench, args.budgets, bench.output.with_suffix(".png"))
    print(bench.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

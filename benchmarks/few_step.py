"""Few evaluations: the teacher's solvers and every distiller, at the same training budget each.

    python benchmarks/few_step.py --teacher digits --out runs/few-step [--only reflow rfpp] [--no-train]
    ... --variant rfpp-x3 rfpp train.steps=1350    # a row of its own: a recipe with other settings than the shipped ones

For every recipe of `pliant distill --list` (with its shipped settings, on pairs that are made once and shared by those
that ask for the same ones): train, then the Fréchet distance of `num` x `repeats` samples at 1, 2, 4 and 8 evaluations
with its own first-order solver, at the model's own patch size and, of flexible models, with all steps weak (1, 2, 4); and the
straightness S of its trajectories. The teacher's rows: Euler, and the best of the solvers below at each count. Rows and
trainings that are there already are kept; a killed run goes on where it stopped. Writes OUT/few-step.json and .md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import pliant
from pliant.compute import Compute
from pliant.distillation import RECIPES, distil, load_recipe
from pliant.evaluation import evaluate, get_extractor, load_reference
from pliant.evaluation.straightness import straightness
from pliant.files import write_json
from pliant.plans import Plan, Sampler, weakest

COUNTS = (1, 2, 4, 8)
"""Evaluations; the columns of the table."""
SOLVERS = ("euler", "heun", "dpmpp-2m", "unipc-2", "flow-ab-2")
"""Of the teacher. Heun takes two calls a step but the last: counts it cannot hit exactly are left out."""


def plans_of(model: pliant.Denoiser, solver: str, count: int, compute: Compute | None = None, guidance: float = 1.0) -> Plan | None:
    """The plan of `solver` with exactly `count` evaluations, or None."""
    for steps in range(1, count + 1):
        try:
            plan = Plan.uniform(model, steps, solver, compute, guidance)
        except pliant.PliantError:
            return None
        if plan.cost(model).evaluations == count:
            return plan
    return None


class Table:
    """Rows in a JSON file, each measured once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.file = args, Path(args.out) / "few-step.json"
        self.settings = {name: getattr(args, name) for name in ("teacher", "reference", "extractor", "num", "repeats")}
        found = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.rows: dict[str, dict] = found.get("rows", {}) if found.get("settings") == self.settings else {}  # type: ignore[type-arg]
        self.extractor = get_extractor(args.extractor)
        self.reference = load_reference(args.reference, self.extractor)

    def measure(self, key: str, denoiser: pliant.Denoiser, plan: Plan, **facts: object) -> None:
        if key in self.rows:
            return
        sampler = Sampler(denoiser, plan)
        report = evaluate(
            lambda labels, seeds: sampler(labels, seeds).clamp(-1, 1).cpu(), self.reference, self.extractor, self.args.num, batch=125,
            num_classes=denoiser.num_classes, repeats=self.args.repeats, describe={"plan": plan.digest()},
        )  # fmt: skip
        cost = plan.cost(denoiser)
        self.keep(key, {**facts, "evaluations": cost.evaluations, "flops": cost.flops, "report": report.to_dict()})
        print(f"{key:44s} {report.distance}", flush=True)

    def keep(self, key: str, row: dict) -> None:  # type: ignore[type-arg]
        self.rows[key] = row
        write_json(self.file, {"settings": self.settings, "rows": self.rows})


def teacher_rows(table: Table, model: pliant.Denoiser) -> None:
    for count in reversed(table.args.counts):  # the most interesting comparison first
        for solver in SOLVERS:
            plan = plans_of(model, solver, count)
            if plan is not None:
                table.measure(f"teacher/{solver}/{count}", model, plan, model="teacher", solver=solver, patch="own")
    straight_row(table, "teacher", model)


def straight_row(table: Table, name: str, model: pliant.Denoiser) -> None:
    key = f"{name}/straightness"
    if key not in table.rows:
        found = straightness(model, steps=16, count=128)
        table.keep(key, {"model": name, **found.to_dict()})


def train(table: Table, name: str, shared: dict[str, str], recipe_name: str, settings: list[str]) -> Path | None:
    """The folder of the model of row `name`; None if it is not there and none is to be trained."""
    args, folder = table.args, Path(table.args.out) / name
    if (folder / "done.json").exists() or (args.no_train and (folder / "model").exists()):
        return folder / "model"
    if args.no_train:
        return None
    recipe = load_recipe(recipe_name, settings)
    pairs = getattr(recipe, "pairs", None)
    overrides = list(settings)
    if pairs is not None:
        wanted = json.dumps(pairs.model_dump(), sort_keys=True)
        if wanted in shared and shared[wanted] != str(folder):
            overrides.append(f"pairs.folder={shared[wanted]}")
    started = time.process_time()
    distil(load_recipe(recipe_name, overrides), args.teacher, folder, resume=folder.exists(), quiet=True)
    write_json(folder / "done.json", {"cpu_seconds": time.process_time() - started, "shared_pairs": len(overrides) > len(settings)})
    return folder / "model"


def shared_pairs(args: argparse.Namespace, names: list[str]) -> dict[str, str]:
    """Settings of pairs that several recipes ask for -> the folder of one store, made now."""
    from pliant.distillation.workshop import Workshop

    wanted: dict[str, list] = {}  # type: ignore[type-arg]
    for name in names:
        pairs = getattr(load_recipe(name), "pairs", None)
        if pairs is not None:
            wanted.setdefault(json.dumps(pairs.model_dump(), sort_keys=True), []).append(pairs)
    found = {}
    for k, (key, parts) in enumerate(sorted(wanted.items())):
        if len(parts) > 1 and not args.no_train:
            folder = Path(args.out) / f"pairs-{k}"
            work = Workshop(args.teacher, folder, 0, {"pairs": parts[0].model_dump()}, resume=folder.exists(), quiet=True)
            started = time.process_time()
            found[key] = work.pairs("store", args.teacher, parts[0])
            print(f"{found[key]}: {parts[0].count} pairs, {time.process_time() - started:.0f} CPU seconds", flush=True)
    return found


def recipe_rows(table: Table, name: str, folder: Path) -> None:
    model = pliant.load(folder).to(table.args.device)
    own = Plan.own(model)
    assert own is not None
    solver, file = own.steps[0].solver.name, folder.parent / "done.json"
    spent = json.loads(file.read_text())["cpu_seconds"] if file.exists() else None
    facts = {"model": name, "solver": solver, "cpu_seconds": spent, "parameters": sum(p.numel() for p in model.parameters())}
    uniform = plans_of(model, solver, len(own.steps), own.steps[0].compute)
    if uniform is None or uniform.digest() != own.digest():  # else it is one of the rows below
        table.measure(f"{name}/own plan", model, own, patch="plan", **facts)
    if any(step.compute.refine for step in own.steps):
        return  # its few-step plan is the one above; other solvers ask the teacher, which has rows of its own
    for patch, counts in (("own", table.args.counts), ("weak", table.args.counts[:3] if len(model.patch_sizes) > 1 else ())):
        for count in counts:
            plan = plans_of(model, solver, count, Compute() if patch == "own" else weakest(model))
            if plan is not None:
                table.measure(f"{name}/{patch}/{count}", model, plan, patch=patch, **facts)
    straight_row(table, name, model)


def markdown(table: Table) -> str:
    """One line per model and patch size, a column per count."""
    rows = table.rows

    def cell(key: str) -> str:
        if key not in rows:
            return ""
        distance = rows[key]["report"]["distance"]
        return f"{distance['mean']:.3f} ± {distance['std'] or 0:.3f}"

    def spent(name: str) -> str:
        found = [r for r in rows.values() if r["model"] == name and r.get("cpu_seconds")]
        return f"{found[0]['cpu_seconds']:.0f} s" if found else ""

    def straight(name: str) -> str:
        row = rows.get(f"{name}/straightness")
        return f"{row['straightness']:.3g}" if row else ""

    lines = ["| model | " + " | ".join(map(str, COUNTS)) + " | S | training, CPU |", "|---" * (len(COUNTS) + 3) + "|"]
    lines.append("| teacher, Euler | " + " | ".join(cell(f"teacher/euler/{c}") for c in COUNTS) + f" | {straight('teacher')} | |")
    best = []
    for count in COUNTS:
        found = [(r["report"]["distance"]["mean"], r["solver"], k) for k, r in rows.items() if k.startswith("teacher/") and r.get("evaluations") == count]
        best.append(f"{cell(min(found)[2])} ({min(found)[1]})" if found else "")
    lines.append("| teacher, best solver | " + " | ".join(best) + " | | |")
    for name in dict.fromkeys([*RECIPES, *(r["model"] for r in rows.values() if r["model"] != "teacher")]):
        for patch, label in (("own", name), ("weak", f"{name}, all steps weak")):
            cells = [cell(f"{name}/{patch}/{c}") for c in COUNTS]
            if any(cells):
                first = patch == "own"
                lines.append(f"| {label} | " + " | ".join(cells) + f" | {straight(name) if first else ''} | {spent(name) if first else ''} |")
        if f"{name}/own plan" in rows:
            row = rows[f"{name}/own plan"]
            lines.append(f"| {name}, its own plan ({row['evaluations']} evaluations, {row['flops'] / 1e9:.3g} GFLOP) | " + cell(f"{name}/own plan") + " |" * (len(COUNTS) + 2))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="digits")
    parser.add_argument("--reference", default="digits")
    parser.add_argument("--extractor", default="digits-classifier")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="evaluations to measure at")
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="recipes, in this order; default: all")
    parser.add_argument("--device", default="cpu", help="of the measurements; training takes the GPU if there is one")
    parser.add_argument("--no-train", action="store_true", help="measure what is trained, train nothing")
    parser.add_argument("--out", required=True)
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar="ROW RECIPE KEY=VALUE", help="another row: its name, the recipe, settings")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = list(RECIPES) if args.only is None else args.only
    table = Table(args)
    shared = shared_pairs(args, names)
    for name, recipe, *settings in [*([name, name] for name in names), *args.variant]:
        folder = train(table, name, shared, recipe, settings)
        if folder is not None:
            recipe_rows(table, name, folder)
        Path(args.out, "few-step.md").write_text(markdown(table))
    teacher_rows(table, pliant.load(args.teacher).to(args.device))
    Path(args.out, "few-step.md").write_text(markdown(table))
    print(markdown(table))


if __name__ == "__main__":
    main()

"""Every solver on the shipped digits model: a picture of all, and quality against network calls for the deterministic.

    python scripts/solver_study.py [--num 300] [--picture docs/images/solvers.png] [--output docs/solvers.json]

Writes the JSON (kept rows are not measured again), and docs/solvers.md with the table. Budgets are network calls: each
solver takes as many steps as fit into 5, 10, 20 and 50. The number in a cell is the Fréchet distance of `num` samples.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import pliant
from pliant import imaging
from pliant.errors import PliantError
from pliant.evaluation import evaluate, get_extractor, load_reference
from pliant.files import replaced_file, write_json
from pliant.plans import Plan, Sampler
from pliant.solvers import SOLVERS

BUDGETS = (5, 10, 20, 50)


def usable(model: pliant.Denoiser) -> list[str]:
    """Names that need no further options and run on this model's path."""
    names = []
    for name, entry in SOLVERS.items():
        try:
            entry()
            Plan.uniform(model, 6, name).cost(model)
        except (TypeError, PliantError):
            continue
        if not entry.compat and name != "rows":  # which is whatever coefficients it is given
            names.append(name)
    return names


def fitting(model: pliant.Denoiser, name: str, calls: int) -> Plan | None:
    """The plan with the most steps that needs at most `calls` network calls."""
    for steps in range(calls, 0, -1):
        try:
            plan = Plan.uniform(model, steps, name)
            if plan.cost(model).calls <= calls:
                return plan
        except PliantError:
            continue
    return None


def picture(model: pliant.Denoiser, names: list[str], file: str) -> None:
    """One row per solver, one column per digit, the same noise, 20 calls."""
    from PIL import ImageDraw

    rows = []
    for name in names:
        plan = fitting(model, name, 20)
        if plan is not None:
            images = Sampler(model, plan)(list(range(10)), list(range(10))).clamp(-1, 1)
            rows.append((name, imaging.grid(imaging.enlarged(imaging.to_pixels(images), 4), 10)))
    height = rows[0][1].shape[1] + imaging.GAP
    width, columns = rows[0][1].shape[2], 3
    per_column = -(-len(rows) // columns)
    sheet = torch.full((1, per_column * height, columns * (width + 160)), 255, dtype=torch.uint8)
    for k, (_, row) in enumerate(rows):
        top, left = (k % per_column) * height, (k // per_column) * (width + 160)
        sheet[:, top : top + row.shape[1], left + 150 : left + 150 + width] = row
    drawn = imaging.to_picture(sheet)
    pen = ImageDraw.Draw(drawn)
    for k, (name, _) in enumerate(rows):
        pen.text(((k // per_column) * (width + 160) + 4, (k % per_column) * height + 10), name, fill=0)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    drawn.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--picture", default="docs/images/solvers.png")
    parser.add_argument("--output", default="docs/solvers.json")
    args = parser.parse_args()
    model = pliant.load("digits")
    names = usable(model)
    picture(model, names, args.picture)
    extractor = get_extractor("digits-classifier")
    reference = load_reference("digits", extractor)
    output = Path(args.output)
    done = json.loads(output.read_text()) if output.exists() else {}
    if done.get("num") != args.num:
        done = {"num": args.num, "rows": {}}
    for name in names:
        entry = SOLVERS[name]
        if entry.alias or entry().stochastic:
            continue
        row = done["rows"].setdefault(name, {})
        for calls in BUDGETS:
            if str(calls) in row:
                continue
            plan = fitting(model, name, calls)
            if plan is None:
                row[str(calls)] = None
                continue
            sampler = Sampler(model, plan)
            report = evaluate(
                lambda y, s, run=sampler: run(y, s).clamp(-1, 1), reference, extractor, args.num, batch=100, num_classes=10
            )
            row[str(calls)] = {"calls": plan.cost(model).calls, "distance": report.distance.mean}
        write_json(output, done)
        print(name, {k: v and round(v["distance"], 3) for k, v in row.items()}, flush=True)
    lines = [
        "# Solvers",
        "",
        "`pliant solvers` lists all of them, `pliant solvers --show NAME` prints one as its table of coefficients.",
        "",
        f"Fréchet distance (digits-classifier) of {args.num} samples of the digits model for the deterministic ones, at most",
        "5, 10, 20 and 50 network calls, same seeds, uniform time grid, no guidance (`scripts/solver_study.py`). Finite-sample",
        "bias is the same in every cell; differences below about 0.02 are noise. A dash: no step count fits.",
        "",
        "| solver | form | order | 5 | 10 | 20 | 50 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in done["rows"].items():
        solver = SOLVERS[name]()
        cells = " | ".join("-" if row[str(c)] is None else f"{row[str(c)]['distance']:.3f}" for c in BUDGETS)
        lines.append(f"| {name} | {solver.form} | {solver.convergence} | {cells} |")
    lines += ["", "![every solver, 20 calls, same noise](images/solvers.png)", ""]
    with replaced_file("docs/solvers.md") as temporary:
        temporary.write_text("\n".join(lines))


if __name__ == "__main__":
    main()

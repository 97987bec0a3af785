"""`pliant distill`: fewer steps from a trained model, by a named recipe."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json, note, progress, table, warnings
from pliant.cli.train import _need
from pliant.errors import ConfigError

EXAMPLES = """\b
Examples:
  pliant distill --list
  pliant distill reflow --teacher digits --out runs/reflow
  pliant distill reflow --teacher digits --out runs/reflow rounds=2 train.steps=2000
  pliant distill reflow --teacher digits --out runs/reflow --resume     goes on where it was interrupted
  pliant distill configs/distill/reflow.yaml --teacher runs/cifar10/model --out runs/cifar10-reflow
"""


def register(app: typer.Typer) -> None:
    app.command("distill", epilog=EXAMPLES)(distill)


def distill(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A recipe's name (--list), or a YAML file.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.", show_default=False)
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="MODEL", help="Folder, file, bundled name or Hub id.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of all stages.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what --out holds.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Name all recipes and stop.")] = False,
    json: opt.JSON = False,
) -> None:
    """Distil a model to few steps. The result, OUT/model, carries its plan: `pliant sample OUT/model` runs it."""
    if listing:
        _list(json)
        return
    if recipe is None:
        raise ConfigError("name a recipe, e.g. 'pliant distill reflow --teacher digits --out runs/reflow'; see --list")
    for name in ("accelerate", "pydantic"):
        _need(name)
    from pliant.distillation import distil, load_recipe
    from pliant.plans import Plan

    settings = load_recipe(recipe, overrides or ())
    if teacher is None or out is None:
        missing = "out" if teacher else "teacher"
        raise ConfigError(f"--{missing} is missing: pliant distill {recipe} --teacher MODEL --out DIR")
    with contextlib.redirect_stdout(sys.stderr):  # progress and log lines; stdout is for the report
        result = distil(settings, teacher, out, resume=resume, quiet=json, progress=progress)
    if int(os.environ.get("RANK", "0")):  # one report, from the main process
        return
    plan = Plan.own(result)
    assert plan is not None  # for the type checker: recipes end with one
    cost = plan.cost(result)
    report = {
        "recipe": settings.recipe,
        "teacher": teacher,
        "model": str(out / "model"),
        "output": str(out),
        "fingerprint": result.fingerprint(),
        "patch_sizes": [list(p) for p in result.patch_sizes],
        "plan_digest": plan.digest(),
        "evaluations": cost.evaluations,
        "flops_per_image": cost.flops,
        "warnings": warnings(),
    }
    if json:
        emit_json(report)
    else:
        print(f"{out / 'model'}: {cost.evaluations} evaluations, {cost.flops / 1e9:.4g} GFLOP per image")
        note(f"look at it: pliant sample {out / 'model'} -o samples.png")


def _list(json: bool) -> None:
    from pliant.distillation.registry import RECIPES

    entries = [RECIPES[name] for name in sorted(RECIPES)]
    if json:
        facts = ("name", "summary", "source", "settings")
        emit_json([{name: str(getattr(entry, name)) for name in facts} for entry in entries])
        return
    table(("recipe", "what it does", "source"), [(e.name, e.summary, e.source) for e in entries])

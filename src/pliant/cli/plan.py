"""`pliant plan`: a budget becomes a plan file that can be read, versioned and run anywhere."""

from __future__ import annotations

import json as json_module
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json
from pliant.cli.option_groups import grouped
from pliant.cli.planning import PlanOptions, cost_facts, plan_from, table_for
from pliant.cli.searching import SearchOptions, list_all, search_facts, searched
from pliant.errors import ConfigError, PliantError

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser
    from pliant.plans import AnyPlan, Plan
    from pliant.plans.timing import Throughput

FROZEN_ON = 8
"""Samples that decide what a frozen plan reuses: classes in turn, seeds 0, 1, ..."""

EXAMPLES = """\b
Examples:
  pliant plan digits --budget 60% --steps 20 -o plan.json
  pliant plan digits --steps 50 --weak-steps 20 --guidance 1.5 --weak-guidance-steps 10 -o plan.json
  pliant plan facebook/DiT-XL-2-256 --steps 250 --solver ddpm --guidance 1.5 --guided-channels 3
  pliant plan digits --budget "60 ms" --steps 20 --guidance 1.5      seconds, predicted for this machine
  pliant plan digits --budget 10% --search auto --time 2min --seed 0 -o plan.json
  pliant plan digits --budget 10% --search auto --time 4min --seed 0 --resume -o plan.json     goes on from there
  pliant plan digits --budget 10% --search oss --guidance 1.5    one technique; --list-planners names all
  pliant plan digits --cache teacache:threshold=0.2 --freeze -o plan.json
  pliant plan digits --show plan.json      what a plan costs on a model
  pliant plan --show plan.json             what a plan says
  pliant plan --schema > plan.schema.json  JSON Schema of plan files
"""


def register(app: typer.Typer) -> None:
    app.command("plan", epilog=EXAMPLES)(grouped(plan))


def plan(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder, file, bundled name or Hub id.")] = None,
    choices: PlanOptions = PlanOptions(),  # noqa: B008, a frozen value
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Images at once, for predicted seconds and bytes.  [default: the budget's, or 1]",
            show_default=False,
        ),
    ] = None,
    search: SearchOptions = SearchOptions(),  # noqa: B008, a frozen value
    list_planners: Annotated[bool, typer.Option("--list-planners", help="Name the planners, and end.")] = False,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="Sample once and write down what the gates of --cache decide.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Plan file to write. Default: only print.", show_default=False)
    ] = None,
    show: Annotated[Path | None, typer.Option("--show", help="Describe this plan file instead of making one.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of plan files.")] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="What seconds are predicted for: cpu, cuda.  [default: cpu]")
    ] = None,
    format: opt.Format = None,
    option: opt.LoadOptions = None,
    json: opt.JSON = False,
) -> None:
    """Make a plan: every decision of a sampling run, with its exact cost.

    With a budget alone it is the best plan known: found in advance for bundled models, else in closed form. --search
    looks for one. With other options, such as --steps, the first steps are weak (coarse patches) and the rest powerful,
    the fewest weak ones that meet the budget.
    Seconds are predicted from what 'pliant bench' measured; a budget in seconds measures it if that was never run.
    """
    if schema:
        from pliant.plans.schema import plan_schema

        emit_json(plan_schema())
        return
    if list_planners:
        list_all(json)
        return
    if show is not None:
        if freeze:
            raise ConfigError("--show only describes a plan: leave out --freeze")
        _show(show, model, choices, out, format, option, json, batch_size or 1, device)
        return
    if model is None:
        raise ConfigError("name a model to plan for, e.g. 'pliant plan digits --budget 60%'")

    from pliant.cli.models import open_model
    from pliant.plans import Plan, parse_budget

    budget = choices.budget
    search.check(budget, choices, out)
    denoiser = open_model(model, format, option, device or "cpu").denoiser
    table_for(denoiser, choices.throughput)  # a table that does not fit is refused before a search, not after it
    found = None if search.planner is None else searched(denoiser, choices, search, out)
    made = plan_from(None, denoiser, choices) if found is None else found.plan
    batch = batch_size or (parse_budget(budget).batch if budget is not None else 1)
    if freeze:
        if not isinstance(made, Plan):
            raise ConfigError("--freeze writes down what one plan decides: leave it out where every class has its own")
        made = made.freeze(denoiser, [i % denoiser.num_classes for i in range(FROZEN_ON)])
    if out is not None:
        try:
            made.save(out)
        except OSError as error:
            raise PliantError(f"could not write {out}: {error.strerror or error}") from None
    if json:
        facts = {"file": str(out) if out else None, "digest": made.digest()}
        table = table_for(denoiser, choices.throughput)
        evidence = {} if found is None else {"search": search_facts(found)}
        emit_json({**facts, "cost": cost_facts(made, denoiser, batch, table), **evidence, "plan": made.to_dict()})
        return
    if found is not None:
        print(found.headline())
    print(described(made, denoiser, batch, table_for(denoiser, choices.throughput)))
    if out is not None:
        print(f"\n{out} written; run it with: pliant sample {model} --plan {out}")


def _show(
    file: Path,
    model: str | None,
    choices: PlanOptions,
    out: Path | None,
    format: str | None,
    option: list[str] | None,
    json: bool,
    batch: int,
    device: str | None,
) -> None:
    from pliant.cli.models import open_model
    from pliant.plans import load_plan

    extra = [*replace(choices, throughput=None).given(), *(["--out"] if out else [])]
    if extra:
        raise ConfigError(f"--show only describes a plan: leave out {extra[0]}")
    loaded = load_plan(file)
    denoiser = None if model is None else open_model(model, format, option, device or "cpu").denoiser
    table = None if denoiser is None else table_for(denoiser, choices.throughput)
    if json:
        cost = None if denoiser is None else cost_facts(loaded, denoiser, batch, table)
        emit_json({"file": str(file), "digest": loaded.digest(), "cost": cost, "plan": loaded.to_dict()})
    elif denoiser is not None:
        print(described(loaded, denoiser, batch, table))
    else:
        print(summary(file))


def described(plan: AnyPlan, model: Denoiser, batch: int, table: Throughput | None) -> str:
    """The table of a plan's steps, or of the plans that classes take."""
    from pliant.plans import Plan

    if isinstance(plan, Plan):
        return plan.describe(model, batch, table)
    return plan.describe(model)


def summary(file: Path) -> str:
    """What a plan file says, without a model to price it."""
    from pliant.plans import Plan, load_plan

    loaded = load_plan(file)
    if isinstance(loaded, Plan):
        return _summary(loaded, file)
    lines = [f"routed plans {loaded.digest()}: {len(loaded.plans)}, for {len(loaded.table)} classes"]
    for k, plan in enumerate(loaded.plans):
        lines.append(f"  {plan.digest()}  {len(plan.steps)} steps  classes {loaded.classes_of(k)}")
    return "\n".join([*lines, f"For their cost name the model: pliant plan MODEL --show {file}"])


def _summary(loaded: Plan, file: Path) -> str:
    from itertools import groupby

    made_for = f"{loaded.model.get('name') or 'model'} {loaded.model['fingerprint']}" if loaded.model else "any model"
    lines = [
        f"plan {loaded.digest()}: {len(loaded.steps)} steps, path {loaded.path.to_config()['name']}, for {made_for}",
    ]
    if loaded.provenance:
        lines.append("made as " + ", ".join(f"{k} {v}" for k, v in loaded.provenance.items()))
    times = loaded.times

    def key(i: int) -> str:
        step = loaded.steps[i]
        return json_module.dumps([step.solver.to_config(), step.compute.to_dict(), step.to_dict()["guidance"]])

    for _, group in groupby(range(len(loaded.steps)), key):
        members = list(group)
        first, last = members[0], members[-1]
        step = loaded.steps[first]
        guidance = "unguided"
        if step.guidance is not None:
            guidance = f"guidance {step.guidance.scale:g} against {step.guidance.against}"
        lines.append(
            f"  steps {first}-{last}  t {times[first]:.3f} -> {times[last + 1]:.3f}  {step.solver.name}  "
            f"{step.compute.describe()}  {guidance}"
        )
    lines.append(f"For its cost name the model: pliant plan MODEL --show {file}")
    return "\n".join(lines)

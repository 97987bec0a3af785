"""`pliant frontier`: plans over a range of budgets, measured, as a table, a picture and a page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json, table
from pliant.errors import PliantError

if TYPE_CHECKING:
    from pliant.cli.frontier_rows import Row
    from pliant.cli.frontier_run import Run
    from pliant.planning.entries import Skipped

EXAMPLES = """\b
Examples:
  pliant frontier digits
  pliant frontier digits --budgets 40%,20%,10%,5% --num 2000 --repeats 3 -o frontier-digits
  pliant frontier digits --planners weak-split,boss --solvers dpmpp-2m,unipc,heun
  pliant frontier cifar10 --reference cifar10-train.parquet --guidance 1.5
  pliant frontier my-model --reference photos/ --plans mine.json --plans other.json
"""

BUDGETS, SOLVERS = "75%,50%,30%,20%,10%,5%", "dpmpp-2m,unipc,ddim"


def register(app: typer.Typer) -> None:
    app.command("frontier", epilog=EXAMPLES)(frontier)


def frontier(
    model: opt.Model,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", help="As in 'pliant eval'. Default: digits for models of digits.", show_default=False
        ),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option("--extractor", help="As in 'pliant eval'. Default: by the image size.", show_default=False),
    ] = None,
    budgets: Annotated[str, typer.Option("--budgets", help="Shares of full compute, or FLOPs per image.")] = BUDGETS,
    planners: Annotated[
        str | None,
        typer.Option(
            "--planners",
            help="Planners to run at every budget, or none.  [default: weak-split where the model is flexible]",
            show_default=False,
        ),
    ] = None,
    solvers: Annotated[
        str, typer.Option("--solvers", help="Baselines: fewer full steps with each of these, or none.")
    ] = SOLVERS,
    plans: Annotated[
        list[Path] | None, typer.Option("--plans", help="Plan file to add. Repeatable.", show_default=False)
    ] = None,
    num: Annotated[int, typer.Option("--num", min=2, help="Images per plan and repeat.")] = 1000,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Repeats with other seeds.")] = 1,
    search_num: Annotated[
        int, typer.Option("--search-num", min=0, help="Images per plan that a planner tries; 0: closed forms only.")
    ] = 200,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the full plan.")] = 50,
    guidance: opt.GuidanceScale = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the planners; distances use seeds of their own.")] = 0,
    rounds: Annotated[
        int, typer.Option("--rounds", min=0, help="Rounds of timings, the plans in turn; 0: no seconds.")
    ] = 5,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.")] = Path("frontier"),
    cache: Annotated[
        Path | None,
        typer.Option("--cache-dir", help="Folder of stored measurements.  [default: OUT/cache]", show_default=False),
    ] = None,
    batch_size: opt.BatchSize = 100,
    decode: opt.Decoder = None,
    device: opt.Device = None,
    format: opt.Format = None,
    option: opt.LoadOptions = None,
    json: opt.JSON = False,
) -> None:
    """Measure plans over a range of budgets: planners, fewer steps with named solvers, and plans of your own.

    Writes frontier.csv, frontier.png, index.html and every plan into a folder. Measurements are kept by what decides
    them (plan, weights, extractor, reference, seeds): a run that was interrupted goes on where it stopped, and a second
    one costs nothing.
    """
    from pliant.cli import frontier_run
    from pliant.planning.entries import budgets_of

    begun = time.perf_counter()
    limits = budgets_of(frontier_run.listed(budgets))
    run, network, real = frontier_run.prepare(
        model,
        reference,
        extractor,
        limits,
        steps,
        guidance,
        num,
        repeats,
        batch_size,
        decode,
        device,
        format,
        option,
        out,
    )
    cache = cache or out / "cache"
    entries, skipped = frontier_run.baseline_entries(run, solvers, plans or [])
    chosen = frontier_run.planner_names(planners, run)
    frontier_run.make_folders(out, cache)
    planned, more = frontier_run.planned_entries(run, chosen, cache, search_num, seed, network, real)
    entries, skipped = [entries[0], *planned, *entries[1:]], [*more, *skipped]
    rows, machine = frontier_run.measure(run, entries, cache, rounds)
    pictures = frontier_run.strips(run, rows, cache)
    report = _write(run, rows, pictures, skipped, machine, model)
    report["seconds"] = time.perf_counter() - begun
    if json:
        emit_json(report)
        return
    _print(report, skipped)


def _write(
    run: Run,
    rows: list[Row],
    pictures: list[tuple[Row, bytes]],
    skipped: list[Skipped],
    machine: dict[str, str],
    model: str,
) -> dict[str, Any]:
    from pliant.cli.frontier_page import page
    from pliant.cli.frontier_plot import plot
    from pliant.cli.frontier_rows import as_csv, as_dicts
    from pliant.files import replaced_file, write_json
    from pliant.planning import LEVEL

    objective, count = run.objectives[0], len(run.objectives)
    recipe: dict[str, Any] = {
        "model": run.opened.name,
        "source": run.opened.source,
        "weights_sha256": run.facts["weights_sha256"],
        "full_plan": f"{len(run.full.steps)} steps, {run.full.steps[0].solver.name}, guidance {run.guidance or 1:g}",
        **objective.describe(),
        "preprocessing": objective.extractor.preprocessing,
        "images": objective.num,
        "repeats": count,
        "seeds": ", ".join(o.describe()["seeds"] for o in run.objectives),
        "precision": run.facts["precision"],
        **({"autoencoder": run.facts["autoencoder"]} if run.facts["autoencoder"] else {}),
        **machine,
        "pliant": run.facts["pliant"],
    }
    dicts = as_dicts(rows, run.full.cost(run.opened.denoiser).flops)
    times = f"{objective.num:,} images" + (f" x {count} repeats" if count > 1 else "")
    title = f"{run.opened.name}: {times}" + (f", guidance {run.guidance:g}" if run.guidance else "")
    charts = plot(rows, title, objective.name, LEVEL, machine["machine"].partition(", torch")[0])
    best = next(d for d in sorted(dicts, key=lambda d: d["flops_per_image"]) if d["on_frontier"])
    commands = [
        f"pliant sample {model} --plan {run.out}/{best['plan_file']} -o samples.png",
        f"pliant plan {model} --show {run.out}/{best['plan_file']}",
    ]
    named = [(f"{r.entry.family} {r.entry.budget}".strip(), f"{r.cost.flops / 1e9:.3g} GFLOP", p) for r, p in pictures]
    html = page(title, objective.name, LEVEL, dicts, charts[1] if charts else None, named, recipe, commands, skipped)
    files = {
        "csv": "frontier.csv",
        "json": "frontier.json",
        "page": "index.html",
        **({"plot": "frontier.png"} if charts else {}),
    }
    report: dict[str, Any] = {
        "metric": objective.name,
        "level": LEVEL,
        "recipe": recipe,
        "rows": dicts,
        "skipped": [vars(s) for s in skipped],
        "files": {k: str(run.out / v) for k, v in files.items()},
    }
    try:
        for row in rows:
            row.entry.plan.save(run.out / row.file)
        contents = {"csv": as_csv(dicts).encode(), "page": html.encode(), **({"plot": charts[0]} if charts else {})}
        for key, content in contents.items():
            with replaced_file(run.out / files[key]) as temporary:
                temporary.write_bytes(content)
        write_json(run.out / files["json"], report)
    except OSError as error:
        raise PliantError(f"could not write to {run.out}: {error.strerror or error}") from None
    return report


def _print(report: dict[str, Any], skipped: Sequence[Skipped]) -> None:
    from pliant.cli.frontier_page import cells_of

    columns = [
        "plan",
        "budget",
        "FLOPs",
        "GFLOP",
        "steps",
        "NFE",
        "ms/image",
        "distance",
        f"{report['level']:.0%} interval",
    ]
    lines = [[("* " if r["on_frontier"] else "  ") + r["family"], *cells_of(r)] for r in report["rows"]]
    table(columns, lines)
    images = f"{report['recipe']['images']:,} images per plan and repeat"
    print(f"{report['metric']}, {images}. * no other plan is cheaper and at least as good.")
    for s in skipped:
        print(f"no plan: {s.family} at {s.budget}: {s.reason}")
    print("recipe: " + ", ".join(f"{k} {v}" for k, v in report["recipe"].items()))
    for name, file in report["files"].items():
        print(f"{name:6s}{file}")
    if "plot" not in report["files"]:
        print("plot  needs matplotlib: pip install 'pliant[plots]'")

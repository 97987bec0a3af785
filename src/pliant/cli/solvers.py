"""`pliant solvers`: every sampler there is, and any of them as the table of numbers it is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json, table

EXAMPLES = """\b
Examples:
  pliant solvers                                  all of them: form, order, calls per step, noise, source
  pliant solvers --json
  pliant solvers --show unipc-2 --steps 5         its program on the rectified-flow path
  pliant solvers --show ddim:eta=0.5 --steps 10 --path vp-discrete
  pliant solvers --show dpmpp-2m --steps 8 --path vp --grid karras
"""


def register(app: typer.Typer) -> None:
    app.command("solvers", epilog=EXAMPLES)(solvers)


def solvers(
    show: Annotated[
        str | None, typer.Option("--show", metavar="SOLVER", help="Print this solver's program instead of the list.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="With --show: sampling steps.")] = 5,
    path: Annotated[str, typer.Option(help="With --show: linear, vp-discrete, vp, cosine, gvp, ...")] = "linear",
    grid: Annotated[str | None, typer.Option(help="With --show: time grid. Default: the path's own.")] = None,
    json: opt.JSON = False,
) -> None:
    """List the solvers, or print one as a readable table of coefficients."""
    if show is None:
        _list(json)
    else:
        _show(show, steps, path, grid, json)


def _facts() -> list[dict[str, Any]]:
    """One row per registered name, at its default options."""
    from pliant.solvers import SOLVERS, solver_infos

    return [
        {
            "name": info.name,
            "source": info.source,
            "alias": SOLVERS[info.name].alias,
            "compat": info.compat,
            "form": info.form,
            "order": info.order,
            "evaluations_per_step": info.evaluations,
            "stochastic": info.stochastic,
            "options": list(SOLVERS[info.name].takes),
        }
        for info in solver_infos()
    ]


def _list(json: bool) -> None:
    rows = _facts()
    if json:
        emit_json({"solvers": rows})
        return
    columns = ("solver", "form", "order", "calls/step", "noise", "options", "source")

    table(
        columns,
        [
            (
                row["name"],
                row["form"],
                str(row["order"]),
                str(row["evaluations_per_step"]),
                "yes" if row["stochastic"] else "",
                ", ".join(row["options"]),
                row["source"] + (" (compatibility)" if row["compat"] else ""),
            )
            for row in rows
        ],
    )


def _show(show: str, steps: int, path_name: str, grid: str | None, json: bool) -> None:
    from pliant.cli.planning import solver_config
    from pliant.paths import default_times, get_grid, get_path
    from pliant.solvers import compile_program, get_solver

    path = get_path(path_name)
    times = default_times(path, steps) if grid is None else get_grid(grid)(path, steps)
    solver = get_solver(solver_config(show))
    # A network's own kind, so that what is printed is what runs: epsilon on tables, velocity elsewhere.
    stored = "epsilon" if path.name == "vp-discrete" else "velocity"
    program = compile_program(path, times, solver, stored, variance=True)  # type: ignore[arg-type]
    if json:
        emit_json(program.to_dict())
        return
    typer.echo(f"{show} on the {path.name} path, {steps} steps, network predicts {stored}")
    typer.echo(program.describe())



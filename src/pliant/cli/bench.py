"""`pliant bench`: how fast this machine runs a model, measured once, so that plans can be priced in seconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json, note, progress, table
from pliant.errors import ConfigError, PliantError

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser
    from pliant.plans.timing import Throughput

EXAMPLES = """\b
Examples:
  pliant bench digits                                 every patch size, in this machine's own precision
  pliant bench digits --precision fp32 --precision bf16
  pliant bench digits --rows 32 --rows 64             for batches larger than 8 guided images
  pliant bench digits --adjust                        a second or two: the kept table at the machine's present speed
  pliant bench DiT-S-2.pt --device cuda -o table.json
  pliant plan digits --budget "350 ms" --steps 20     uses what was measured
"""

STEADY = 0.1
"""Change of the machine's speed that is not worth a word."""


def register(app: typer.Typer) -> None:
    app.command("bench", epilog=EXAMPLES)(bench)


def bench(
    model: opt.Model,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            help="Measure this precision, too: fp32, bf16, int8d, ... Repeatable. Default: what calls run in here.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(
            "--rows",
            min=1,
            help="Rows of a network call (a guided image has two), beside 1, 2, 4, 8 and 16. Repeatable.",
            show_default=False,
        ),
    ] = None,
    unmerged: Annotated[
        bool, typer.Option("--unmerged", help="Measure patch sizes with unmerged adapters, too.")
    ] = False,
    adjust: Annotated[
        bool,
        typer.Option("--adjust", help="Only bring the kept table to the machine's present speed, by a few plain runs."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="File to write. Default: the user's cache, where plans find it."),
    ] = None,
    format: opt.Format = None,
    option: opt.LoadOptions = None,
    device: opt.Device = None,
    json: opt.JSON = False,
) -> None:
    """Measure this machine: seconds of a model's network calls and of all that happens around them.

    Kept per model and machine in ~/.cache/pliant ($PLIANT_CACHE); what was measured before stays, if it is not measured
    again. Run it while the machine does nothing else.
    """
    from pliant.cli.models import open_model
    from pliant.plans.timing import cache_file, cached_table
    from pliant.plans.timing.measure import ROWS, default_computes, measure

    opened = open_model(model, format, option, device)
    denoiser = opened.denoiser
    if adjust:
        if precision or rows or unmerged:
            raise ConfigError("--adjust measures nothing new: leave out --precision, --rows and --unmerged")
        _adjust(opened.name, denoiser, out or cache_file(denoiser), json)
        return
    computes = default_computes(denoiser, precision or (None,))
    if unmerged:
        if len(denoiser.patch_sizes) < 2:
            raise ConfigError("--unmerged is for models with adapters; this one has one patch size only")
        from dataclasses import replace

        computes += [replace(c, merged=False) for c in default_computes(denoiser) if c.patch != denoiser.patch_sizes[0]]
    began = time.monotonic()
    with progress(f"measuring {opened.name}") as advance:
        made = measure(denoiser, computes, sorted({*ROWS, *(rows or ())}), advance)
    if (spread := made.measured["spread"]) > STEADY:
        note(
            f"the machine's speed changed by {spread:.0%} while this was measured, and predictions will be as far "
            f"off: measure again while it does nothing else"
        )
    file = out or cache_file(denoiser)
    if out is None and (old := cached_table(denoiser)) is not None:
        made = old.with_more(made)
    _save(made, file)
    if json:
        emit_json({"file": str(file), "seconds": time.monotonic() - began, "table": made.to_dict()})
        return
    print(f"{opened.name} on {made.machine.describe()}")
    table(*rows_of(made, denoiser))
    step, begin = (1e6 * made.outside[unit].at(1) for unit in ("step", "begin"))
    print(f"around the calls of one image: {step:.0f} us per step, {begin:.0f} us to begin")
    print(f"measured in {time.monotonic() - began:.1f} s; {file} written")


def _adjust(name: str, model: Denoiser, file: Path, json: bool) -> None:
    """The table in `file`, or the kept one, times the present pace, in `file`."""
    from pliant.plans.timing import Throughput, cached_table
    from pliant.plans.timing.adjust import adjusted

    kept = Throughput.load(file) if file.exists() else cached_table(model)
    if kept is None:
        raise ConfigError(f"there is no table of {name} to adjust; measure it: pliant bench {name}")
    kept.check(model)
    made = adjusted(kept, model)
    _save(made, file)
    factor = made.measured["adjusted"] / float(kept.measured.get("adjusted", 1.0))
    if json:
        emit_json({"file": str(file), "pace": factor, "table": made.to_dict()})
        return
    print(f"plain runs now take {factor:.2f} times as long as the table said; {file} adjusted")


def _save(made: Throughput, file: Path) -> None:
    try:
        made.save(file)
    except OSError as error:
        raise PliantError(f"could not write {file}: {error.strerror or error}") from None


def rows_of(made: Throughput, model: Denoiser) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: every kind of call with its milliseconds by rows, and the rate it reaches."""
    curves = {kind: units["call"] for kind, units in made.networks.items() if "call" in units}
    counts = sorted({int(r) for curve in curves.values() for r in curve.rows})
    header = ("network", *(f"{n} row{'s' * (n > 1)}, ms" for n in counts), "GFLOP/s at most")
    rates = rate_of(made, model)
    lines: list[tuple[str, ...]] = []
    for kind, curve in curves.items():
        found = dict(zip(curve.rows, curve.seconds, strict=True))
        cells = [f"{1e3 * found[n]:.3g}" if n in found else "-" for n in counts]
        lines.append((kind, *cells, f"{rates[kind]:.0f}" if kind in rates else "-"))
    return header, lines


def rate_of(made: Throughput, model: Denoiser) -> dict[str, Any]:
    """GFLOP/s that the calls of each patch size reach, at their best number of rows."""
    from pliant.compute import Compute
    from pliant.models.patches import patch_name

    rates = {}
    for kind, units in made.networks.items():
        patch = next((p for p in model.patch_sizes if patch_name(p) == kind.split(" ")[0]), None)
        if patch is not None and "scale" not in kind and "call" in units:
            flops = model.flops(Compute(patch=patch, merged="unmerged" not in kind))
            points = zip(units["call"].rows, units["call"].seconds, strict=True)
            rates[kind] = max(flops * r / s for r, s in points) / 1e9
    return rates

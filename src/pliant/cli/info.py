"""`pliant info`: what a file is. Models, plans, and pictures with a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json, table
from pliant.errors import ConfigError

if TYPE_CHECKING:
    from pliant.integrations.sites.folder import DiffusersTransformer
    from pliant.models.network import NetworkConfig, Size

EXAMPLES = """\b
Examples:
  pliant info digits                        a bundled model
  pliant info DiT-XL-2-256x256.pt           an official checkpoint: format, assumptions, cost per call
  pliant info SiT-XL-2-256.pt --format sit
  pliant info digits --sites                its residual branches and what each costs
  pliant info plan.json                     a plan
  pliant info samples.png --json            the recipe inside a picture
"""


def register(app: typer.Typer) -> None:
    app.command("info", epilog=EXAMPLES)(info)


def info(
    source: Annotated[str, typer.Argument(metavar="MODEL|PLAN|PNG", help="What to look at.", show_default=False)],
    format: opt.Format = None,
    option: opt.LoadOptions = None,
    sites: Annotated[bool, typer.Option("--sites", help="List a model's sites: what `sites` in plans counts.")] = False,
    json: opt.JSON = False,
) -> None:
    """Say what a model, plan or picture is."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() == ".png":
        _picture(path, json)
    elif path.suffix.lower() == ".json" and path.name not in ("config.json", "model_index.json") and not path.is_dir():
        _plan(path, json)
    else:
        _model(source, format, option, sites, json)


def _picture(file: Path, json: bool) -> None:
    from pliant import imaging
    from pliant.cli.recipe import Recipe

    pixels, data = imaging.read_png(file)
    size = f"{pixels.shape[2]}x{pixels.shape[1]}"
    if data is None:
        raise ConfigError(f"{file} ({size}) holds no recipe: it was not made by Pliant, or its metadata was removed")
    recipe = Recipe.from_dict(data)
    if json:
        emit_json({"kind": "picture", "file": str(file), "size": list(pixels.shape[1:]), "recipe": data})
        return
    from pliant.cli.planning import plans_in
    from pliant.plans import read_plan

    plan = read_plan(recipe.plan)
    steps = [s for one in plans_in(plan) for s in one.steps]
    counts = " or ".join(str(n) for n in sorted({len(one.steps) for one in plans_in(plan)}))
    solver = ", ".join(sorted({s.solver.name for s in steps}))
    precision = ", ".join(sorted({s.compute.precision or "auto" for s in steps}))
    made = ", ".join(f"{k} {v}" for k, v in recipe.software.items())
    print(f"{file}: {len(recipe.shows)} images in a picture of {size}")
    print(f"model      {recipe.model['name']} ({recipe.model['source']})")
    print(f"weights    sha256 {recipe.model['weights_sha256'][:16]}..., fingerprint {recipe.model['fingerprint']}")
    print(f"plan       {plan.digest()}: {counts} steps, {solver}, {precision}")
    for image in recipe.shown()[:10]:
        print(f"image      class {image['class']} ({image['name']}), seed {image['seed']}")
    if len(recipe.shows) > 10:
        print(f"           and {len(recipe.shows) - 10} more")
    print(f"made with  {made}")
    print(f"Again: pliant sample --replay {file}")


def _plan(file: Path, json: bool) -> None:
    from pliant.cli.plan import summary
    from pliant.plans import load_plan

    plan = load_plan(file)
    if json:
        emit_json({"kind": "plan", "file": str(file), "digest": plan.digest(), "plan": plan.to_dict()})
    else:
        print(summary(file))


def _model(source: str, format: str | None, option: list[str] | None, sites: bool, json: bool) -> None:
    from pliant.cli.models import load_options
    from pliant.formats import describe_source
    from pliant.integrations.sites.folder import read_transformer

    theirs = None if format else read_transformer(source)
    if theirs is not None:
        _transformer(theirs, sites, json)
        return
    found = describe_source(source, format, **load_options(option))
    calls = calls_of(found.identity)
    listed = {"sites": sites_of(found.identity)} if sites else {}
    if json:
        emit_json({"kind": "model", **found.to_dict(), "calls": calls, **listed})
        return
    print(found.describe())
    table(*call_rows(calls))
    if sites:
        print()
        table(("site", "block", "kind", "GFLOP", "of full"), [
            (str(s["site"]), str(s["block"]), s["kind"], f"{s['flops'] / 1e9:.4g}", f"{s['share']:.2%}")
            for s in listed["sites"]
        ])  # fmt: skip


def _transformer(found: DiffusersTransformer, sites: bool, json: bool) -> None:
    """A transformer of diffusers, which runs in its own pipeline."""
    if json:
        emit_json({"kind": "transformer", **found.to_dict()})
        return
    print(f"{found.folder}: {found.name} of diffusers, {found.parameters:,} parameters")
    print(f"{len(found.sites)} sites in {found.blocks} blocks; for caches in its own pipeline see docs/diffusers.md")
    if sites:
        print()
        rows = [(str(s), str(block), kind) for s, (kind, block) in enumerate(found.sites)]
        table(("site", "block", "kind"), rows)


def sites_of(identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Every residual branch of the network at its own patch size, in order, with its exact FLOPs."""
    from pliant.compute import Compute, spent_macs
    from pliant.models.network import family_of

    config = family_of(identity["network"])[1]
    shape = config.shape()
    total, count = 2 * spent_macs(shape, Compute()), 2 * config.depth
    rows = []
    for site in range(count):
        skipped = "".join(f"{letter}{n}" for letter, n in (("R", site), ("K", 1), ("R", count - site - 1)) if n)
        flops = total - 2 * spent_macs(shape, Compute(sites=skipped))
        kind = "mlp" if site % 2 else "attention"
        rows.append({"site": site, "block": site // 2, "kind": kind, "flops": flops, "share": flops / total})
    return rows


def call_rows(calls: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table of calls; exits get a column where there are any."""
    exits = any("exit" in c for c in calls)
    rows: list[tuple[str, ...]] = []
    for c in calls:
        where = (str(c.get("exit", "full")),) if exits else ()
        rows.append((c["patch"], *where, str(c["tokens"]), f"{c['flops'] / 1e9:.4g}", f"{c['share']:.1%}"))
    return ("patch", *(("exit",) if exits else ()), "tokens", "GFLOP per call", "of full"), rows


def calls_of(identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens and exact FLOPs of one call at every patch size and exit, from a model's identity alone."""
    from pliant.adapters import ExitSpec, FlexSpec
    from pliant.adapters.exit_dit import config_of_exit
    from pliant.models import DiTConfig
    from pliant.models.network import family_of
    from pliant.models.patches import patch_name

    network = identity["network"]
    config, flex, exits = family_of(network)[1], network.get("flex"), network.get("exits")
    added = FlexSpec.from_dict(flex).patch_sizes if flex else getattr(config, "patch_sizes", ())
    sizes = [config.patch_size, *(p for p in added if p != config.patch_size)]
    calls: list[dict[str, Any]] = [{"patch": patch_name(patch), **_call(config, patch)} for patch in sizes]
    if exits and isinstance(config, DiTConfig):
        own = config.patch_size
        for depth in ExitSpec.from_dict(exits).depths:
            calls.append({"patch": patch_name(own), "exit": depth, **_call(config_of_exit(config, depth), own)})
    return [{**c, "share": c["flops"] / calls[0]["flops"]} for c in calls]


def _call(config: NetworkConfig, patch: Size) -> dict[str, int]:
    from pliant.compute import MATMUL, macs

    shape = config.shape(patch=patch)
    return {"tokens": shape.tokens, "flops": 2 * macs(shape, MATMUL)}

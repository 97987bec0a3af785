"""`pliant sample`: images from a model and a plan, and the same image again from its file."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json, progress
from pliant.cli.option_groups import grouped
from pliant.cli.planning import PlanOptions, cost_facts, own_precision, plan_from, with_precision
from pliant.cli.searching import SearchOptions, search_facts, searched
from pliant.errors import ConfigError, PliantError

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.cli.models import Opened
    from pliant.cli.recipe import Recipe
    from pliant.cli.sampling import Decode

EXAMPLES = """\b
Examples:
  pliant sample digits --budget 60% --steps 20 -o digits.png
  pliant sample digits --budget 10% --search auto --time 2min      'pliant plan' keeps what it finds in a file
  pliant sample digits --class 3 --class 7 --num 16 --seed 5 -o threes-and-sevens.png
  pliant sample facebook/DiT-XL-2-256 --class "golden retriever" --guidance 4 --decode stabilityai/sd-vae-ft-ema
  pliant sample digits --plan plan.json --num 500 -o samples/        one PNG per image
  pliant sample digits --plan plan.json --num 10000 -o samples.npz   for evaluators: arr_0, uint8, NHWC
  pliant sample clothing --size 96x160 --decode taef2/ -o wide.png    another shape, for models of any size
  pliant sample --replay digits.png -o again.png                     the same bytes, checked
"""

Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--class",
        metavar="ID|NAME",
        help="Class id or name, or null. Repeatable; default: all in turn.",
        show_default=False,
    ),
]
Number = Annotated[
    int | None,
    typer.Option(
        "--num", min=1, help="Images in all, over the classes in turn. Default: one per class, at most 10 classes."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", help="out.png (one sheet), a folder (a PNG each), .npz or .safetensors.", show_default=False
    ),
]


def register(app: typer.Typer) -> None:
    app.command("sample", epilog=EXAMPLES)(grouped(sample))


def sample(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder, file, bundled name or Hub id.")] = None,
    classes: Classes = None,
    num: Number = None,
    seed: opt.Seed = 0,
    out: Out = None,
    columns: Annotated[int | None, typer.Option("--columns", min=1, help="Images per row of a sheet.")] = None,
    zoom: Annotated[
        int | None, typer.Option("--zoom", min=1, help="Enlarge pixels. Default: small images to 64.")
    ] = None,
    replay: Annotated[Path | None, typer.Option("--replay", help="Make this PNG of Pliant again and compare.")] = None,
    plan: opt.PlanFile = None,
    choices: PlanOptions = PlanOptions(),  # noqa: B008, a frozen value
    search: opt.SearchName = None,
    search_time: opt.SearchTime = None,
    size: opt.StateSize = None,
    extrapolation: opt.Extrapolation = None,
    batch_size: opt.BatchSize = 16,
    decode: opt.Decoder = None,
    device: opt.Device = None,
    format: opt.Format = None,
    option: opt.LoadOptions = None,
    json: opt.JSON = False,
) -> None:
    """Sample images. Every PNG carries its full recipe, so it can be replayed.

    Image k has seed SEED + k and is the same alone, in a batch and on another day.
    """
    if replay is not None:
        given = (("--plan", plan), ("--class", classes), ("--size", size), ("--extrapolation", extrapolation),
                 ("--search", search), ("--time", search_time))  # fmt: skip
        ignored = [*(name for name, value in given if value), *choices.given()]
        if ignored:
            raise ConfigError(f"--replay takes everything from the picture: leave out {ignored[0]}")
        _report(_replay(replay, model, out, decode, device), json)
        return
    if model is None:
        raise ConfigError("name a model, e.g. 'pliant sample digits', or a picture with --replay")

    from pliant.cli.labels import choose_classes
    from pliant.cli.models import open_model
    from pliant.cli.recipe import run_recipe
    from pliant.cli.sizes import at_size

    wanted = SearchOptions(search, search_time)
    wanted.check(choices.budget, choices, None)
    if search is not None and plan is not None:
        raise ConfigError("a plan file decides everything: leave out --search, or --plan")
    opened = open_model(model, format, option, device)
    opened = replace(opened, denoiser=at_size(opened.denoiser, size, extrapolation, decode))
    denoiser = opened.denoiser
    asked = None if search is not None else plan_from(plan, denoiser, choices)
    labels, distinct = choose_classes(classes, num, denoiser)
    out = _target(out, opened, decode)
    found = None if search is None else searched(denoiser, choices, wanted, None)
    chosen = found.plan if found is not None else asked
    assert chosen is not None
    decoder = _open_decoder(decode, opened) if decode and out.suffix != ".safetensors" else None
    pinned = own_precision(denoiser)
    recipe = run_recipe(
        opened,
        with_precision(chosen, pinned) if pinned else chosen,
        labels,
        [seed + k for k in range(len(labels))],
        batch_size,
        decode if decoder else None,
    )
    recipe = replace(recipe, columns=min(columns or min(len(distinct), 10), len(labels)))
    begun = time.perf_counter()
    files = _write(recipe, opened, decoder, out, zoom)
    report = {
        "out": str(out),
        "files": files,
        "images": len(labels),
        "seconds": time.perf_counter() - begun,
        "model": recipe.model,
        "plan_digest": chosen.digest(),
        "cost": cost_facts(chosen, denoiser, classes=labels),
        "precision": pinned,
        **({} if found is None else {"search": search_facts(found)}),
        "samples": recipe.shown(),
    }
    if found is not None and not json:
        print(found.headline())
    _report(report, json)


def _report(report: dict[str, Any], json: bool) -> None:
    if json:
        emit_json(report)
    elif "identical" in report:
        print(f"{report['out']}: {report['verdict']}")
    else:
        cost = report["cost"]
        share = cost["of_budget_baseline"] or f"{cost['share']:.1%} of full compute"
        print(
            f"{report['out']}: {report['images']} images in {report['seconds']:.1f} s at {share} "
            f"({cost['flops_per_image'] / 1e9:.4g} GFLOP per image)"
        )


def _target(out: Path | None, opened: Opened, decode: str | None) -> Path:
    """Where samples go. Raises ConfigError if latents would have to become pictures without an autoencoder."""
    channels = opened.denoiser.config.in_channels
    pictures = channels in (1, 3) or decode is not None
    if out is None:
        return Path("samples.png" if pictures else "samples.safetensors")
    latents = out.suffix in (".npz", ".safetensors")
    if not pictures and not latents:
        raise ConfigError(
            f"this model makes latents of {channels} channels, not images: give --decode with its autoencoder, "
            f"or save the latents with -o latents.safetensors (or .npz)"
        )
    if out.suffix and not out.is_dir() and out.suffix not in (".png", ".npz", ".safetensors"):
        raise ConfigError(f"cannot write {out.suffix} files: name a .png, .npz or .safetensors file, or a folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create the folder {out.parent}: {error.strerror}") from None
    return out


def _open_decoder(source: str, opened: Opened) -> Decode:
    from pliant.cli.decoding import open_decoder

    return open_decoder(source, opened.denoiser)


def _write(recipe: Recipe, opened: Opened, decoder: Decode | None, out: Path, zoom: int | None) -> list[str]:
    from pliant import imaging
    from pliant.cli import outputs
    from pliant.cli.sampling import run_batches
    from pliant.plans import read_plan

    denoiser, plan = opened.denoiser, read_plan(recipe.plan)
    with progress("sampling") as advance:
        batches = run_batches(denoiser, plan, recipe.classes, recipe.seeds, recipe.batch_size, advance, decoder)
        try:
            if out.suffix == ".safetensors":
                return outputs.write_latents(out, batches, recipe)
            if out.suffix == ".npz":
                return outputs.write_arrays(out, batches, recipe)
            if out.suffix == ".png":
                return outputs.write_sheet(out, batches, recipe, zoom, imaging.VISIBLE)
            return outputs.write_folder(out, batches, recipe, denoiser, zoom or 1)
        except OSError as error:
            raise PliantError(f"could not write {out}: {error.strerror or error}") from None


def _replay(file: Path, model: str | None, out: Path | None, decode: str | None, device: str | None) -> dict[str, Any]:
    """Make a picture again; the recipe in it says how. Raises PliantError if the model is not the same."""
    from pliant import imaging
    from pliant.cli.models import open_model, weights_hash
    from pliant.cli.recipe import Recipe
    from pliant.cli.sampling import picture, png, run_pixels

    original, data = imaging.read_png(file)
    if data is None:
        raise ConfigError(f"{file} holds no recipe: it was not made by 'pliant sample', or its metadata was removed")
    recipe = Recipe.from_dict(data)
    facts = recipe.model
    options = [f"{key}={value}" for key, value in facts.get("options", {}).items()]
    opened = open_model(model or facts["source"], facts.get("format"), options, device)
    if weights_hash(opened.denoiser) != facts["weights_sha256"]:
        raise ConfigError(
            f"{model or facts['source']} is not the model that made {file}: its weights differ (made by "
            f"{facts['name']}, sha256 {facts['weights_sha256'][:12]}...). Name the right one as MODEL"
        )
    if recipe.size is not None or recipe.extrapolation != "none":
        at = recipe.size or opened.denoiser.sample_size
        opened = replace(opened, denoiser=opened.denoiser.at_size(at, recipe.extrapolation))
    decoder = None
    if recipe.decoder is not None:
        decoder = _open_decoder(decode or recipe.decoder, opened)

    def pixels(run: Recipe) -> Tensor:
        with progress("replaying") as advance:
            return run_pixels(run, opened.denoiser, decoder, advance)

    # What is shown, computed alone, is usually the same to the bit. Where rounding shows, the whole batch is run again.
    made = pixels(recipe.alone())
    same = _equal(picture(recipe, made), original)
    if not same and len(recipe.shows) < len(recipe.classes):
        made = pixels(recipe)
        same = _equal(picture(recipe, made), original)
    out = out or file.with_name(f"{file.stem}-replay.png")
    out.write_bytes(png(recipe, made))
    off = _largest_difference(picture(recipe, made), original)
    verdict = "the same picture, bit for bit" if same else f"differs from {file} by up to {off} of 255 levels"
    return {
        "out": str(out),
        "replayed": str(file),
        "identical": same,
        "identical_bytes": out.read_bytes() == file.read_bytes(),
        "largest_difference": off,
        "verdict": verdict,
        "samples": recipe.shown(),
        "made_with": recipe.software,
    }


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def _largest_difference(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max()) if a.shape == b.shape else 255

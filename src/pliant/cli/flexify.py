"""`pliant flexify`: new patch sizes for a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json, table
from pliant.errors import PliantError

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser

EXAMPLES = """\b
Examples:
  pliant flexify facebook/DiT-XL-2-256 dit-xl-flexible --patch 4
  pliant flexify runs/cifar10/model flexible --patch 4 --patch 2x4 --rank 64
  pliant flexify runs/cifar10/model flexible --patch 4 --recipe shared --init average
The weak modes then want a short fine-tuning; a config for it is written beside the model:
  pliant train flexible-finetune.yaml data.source=folder/of/images
"""


def register(app: typer.Typer) -> None:
    app.command("flexify", epilog=EXAMPLES)(flexify)


def flexify(
    model: opt.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Model folder to write.", show_default=False)],
    patch: Annotated[
        list[str],
        typer.Option("--patch", help="New patch size: 4, or 2x4 (height x width). Repeatable.", show_default=False),
    ],
    recipe: Annotated[
        str, typer.Option("--recipe", help="lora: frozen base and an adapter per size. shared: one set of weights.")
    ] = "lora",
    init: Annotated[str, typer.Option("--init", help="noise-aligned, or average (the paper's).")] = "noise-aligned",
    rank: Annotated[int, typer.Option("--rank", help="Of the low-rank adapters.")] = 32,
    alpha: Annotated[float | None, typer.Option("--alpha", help="LoRA scale times rank. Default: rank.")] = None,
    underlying: Annotated[
        str | None,
        typer.Option("--underlying", help="shared: patch size at which weights are stored. Default: largest."),
    ] = None,
    resample: Annotated[str, typer.Option("--resample", help="auto, bilinear or area.")] = "auto",
    position: Annotated[
        str, typer.Option("--position", help="Where a coarse token sits: see the documentation.")
    ] = "center",
    patch_norm: Annotated[str, typer.Option("--patch-norm", help="auto, none, affine or layernorm.")] = "auto",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the adapters' random factors.")] = 0,
    adapter: Annotated[bool, typer.Option("--adapter-only", help="lora: write only the new tensors.")] = False,
    format: opt.Format = None,
    option: opt.LoadOptions = None,
    json: opt.JSON = False,
) -> None:
    """Make a model flexible. At its own patch size nothing changes, to the bit (recipe lora)."""
    from pliant.adapters.flexify import flexify as make_flexible
    from pliant.cli.models import open_model, parse_patch
    from pliant.formats import save, save_adapter
    from pliant.models.flexible import FlexibleTransformer

    sizes = [parse_patch(p) for p in patch]
    opened = open_model(model, format, option, "cpu")
    options: dict[str, Any] = {
        "recipe": recipe,
        "initialisation": init,
        "rank": rank,
        "alpha": alpha,
        "underlying": parse_patch(underlying) if underlying else None,
        "resample": resample,
        "position": position,
        "patch_norm": patch_norm,
    }
    native = isinstance(opened.denoiser.network, FlexibleTransformer)
    flexible = make_flexible(opened.denoiser, sizes, seed=seed, **({} if native else options))
    out = Path(str(out).rstrip("/"))
    config = out.with_name(f"{out.name}-finetune.yaml")
    try:
        (save_adapter if adapter else save)(flexible, out)
        if not adapter:
            config.write_text(finetune_config(flexible, out, config), encoding="utf-8")
    except OSError as error:
        raise PliantError(f"could not write {out}: {error.strerror or error}") from None
    _report(flexible, opened.denoiser, out, None if adapter else config, json)


def _report(flexible: Denoiser, base: Denoiser, out: Path, config: Path | None, json: bool) -> None:
    from pliant.cli.info import calls_of

    calls = calls_of(flexible.identity())
    before, after = (sum(p.numel() for p in d.parameters()) for d in (base, flexible))
    command = f"pliant train {config} data.source=folder/of/images"
    if json:
        facts = {"out": str(out), "parameters": after, "new_parameters": after - before, "calls": calls}
        emit_json({**facts, "finetune_config": str(config) if config else None, "next": command if config else None})
        return
    print(f"{out}: {after:,} parameters, {after - before:,} of them new")
    rows = [(c["patch"], str(c["tokens"]), f"{c['flops'] / 1e9:.4g}", f"{c['share']:.1%}") for c in calls]
    table(("patch", "tokens", "GFLOP per call", "of full"), rows)
    if config is not None:
        print(f"Next, fine-tune the weak modes (settings in {config}):\n  {command}")


def finetune_config(flexible: Denoiser, out: Path, config: Path) -> str:
    """A training config for the new modes: distillation for recipe "lora", the model's own loss for "shared"."""
    from pliant.adapters import FlexiDiT
    from pliant.models.flexible import FlexibleTransformer

    network = flexible.network
    any_size = flexible.core.any_size
    lora = isinstance(network, FlexiDiT) and network.spec.recipe == "lora"
    own = "ddpm" if flexible.config.learn_sigma else "flow_matching"
    objective = "{name: distill}" if lora else f"{{name: shared, own: {{name: {own}}}}}"
    objective = "{name: any_size}" if any_size else objective
    side = f", side: {network.config.sides[1]}" if isinstance(network, FlexibleTransformer) else ""
    tokens = 16 * flexible.config.shape().tokens
    meaning = "the new patch sizes imitate the original one" if lora else "the model's own loss at random patch sizes"
    # The data that a model of ours was trained on is the best guess.
    known = flexible.metadata.get("training", {}).get("config", {}).get("data", {}).get("source")
    return (
        f"# Fine-tunes the new patch sizes of {out}: {meaning}.\n"
        f"#   pliant train {config} data.source=folder/of/images\n"
        f"model: {{from: {out}}}\n"
        f"objective: {objective}\n"
        f"data: {{source: {known or 'folder/of/images'}{side}}}\n"
        f"optimizer: {{lr: {'1e-3' if lora else '1e-4'}, warmup: 100, decay: cosine}}\n"
        f"steps: 2000\n"
        f"{f'tokens: {tokens}' if any_size else 'batch_size: 64'}\n"
        f"ema: {{decay: 0.999}}\n"
        f"output: {out.with_name(out.name + '-finetuned')}\n"
    )

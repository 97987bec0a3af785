"""`pliant exits`: early exits for a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pliant.cli import options as opt
from pliant.cli.console import emit_json, table
from pliant.errors import ConfigError, PliantError

if TYPE_CHECKING:
    from pliant.denoiser import Denoiser

EXAMPLES = """\b
Examples:
  pliant exits facebook/DiT-XL-2-256 dit-xl-exits --depths 8,14,20
  pliant exits digits digits-exits --depths 2,3
The exits then want a short training against the frozen network; a config for it is written beside the model:
  pliant train digits-exits-finetune.yaml data.source=folder/of/images
"""


def register(app: typer.Typer) -> None:
    app.command("exits", epilog=EXAMPLES)(exits)


def exits(
    model: opt.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Model folder to write.", show_default=False)],
    depths: Annotated[
        str, typer.Option("--depths", help="Blocks before each exit, e.g. 2,4.", show_default=False)
    ],
    gates: Annotated[
        str, typer.Option("--gates", help="copy: an exit starts as the last block. zero: as no block at all.")
    ] = "copy",
    adapter: Annotated[bool, typer.Option("--adapter-only", help="Write only the new tensors.")] = False,
    format: opt.Format = None,
    option: opt.LoadOptions = None,
    json: opt.JSON = False,
) -> None:
    """Add early exits: one small block each before the model's own head. At full depth nothing changes, to the bit."""
    from pliant.adapters.exits import attach_exits
    from pliant.cli.models import open_model
    from pliant.formats import save, save_adapter

    wanted = parse_depths(depths)
    opened = open_model(model, format, option, "cpu")
    with_exits = attach_exits(opened.denoiser, wanted, gates=gates)  # type: ignore[arg-type]  # checked there
    out = Path(str(out).rstrip("/"))
    config = out.with_name(f"{out.name}-finetune.yaml")
    try:
        (save_adapter if adapter else save)(with_exits, out)
        if not adapter:
            config.write_text(finetune_config(with_exits, out, config), encoding="utf-8")
    except OSError as error:
        raise PliantError(f"could not write {out}: {error.strerror or error}") from None
    _report(with_exits, opened.denoiser, out, None if adapter else config, json)


def parse_depths(text: str) -> tuple[int, ...]:
    """ "2,4" -> (2, 4). Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"cannot read the depths {text!r}; write numbers of blocks such as 2,4")
    return tuple(int(part) for part in parts)


def _report(with_exits: Denoiser, base: Denoiser, out: Path, config: Path | None, json: bool) -> None:
    from pliant.cli.info import call_rows, calls_of

    calls = calls_of(with_exits.identity())
    before, after = (sum(p.numel() for p in d.parameters()) for d in (base, with_exits))
    command = f"pliant train {config} data.source=folder/of/images"
    if json:
        facts = {"out": str(out), "parameters": after, "new_parameters": after - before, "calls": calls}
        emit_json({**facts, "finetune_config": str(config) if config else None, "next": command if config else None})
        return
    print(f"{out}: {after:,} parameters, {after - before:,} of them new")
    table(*call_rows(calls))
    if config is not None:
        print(f"Next, train the exits (settings in {config}):\n  {command}")


def finetune_config(with_exits: Denoiser, out: Path, config: Path) -> str:
    """A training config for new exits."""
    # The data that a model of ours was trained on is the best guess.
    known = with_exits.metadata.get("training", {}).get("config", {}).get("data", {}).get("source")
    return (
        f"# Trains the exits of {out} to imitate the full network, which stays as it is.\n"
        f"#   pliant train {config} data.source=folder/of/images\n"
        f"model: {{from: {out}}}\n"
        f"objective: {{name: exits}}\n"
        f"data: {{source: {known or 'folder/of/images'}}}\n"
        f"optimizer: {{lr: 1e-3, warmup: 100, decay: cosine}}\n"
        f"steps: 2000\n"
        f"batch_size: 64\n"
        f"ema: {{decay: 0.995}}\n"
        f"output: {out.with_name(out.name + '-finetuned')}\n"
    )
